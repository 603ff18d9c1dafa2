"""How vectors are stored in a table.

float32 and float16 as they are; int8 is the direction alone, so scaled that the largest component is 127 or -127, and
rounded; bits are the signs of the components, eight to a byte, the first in the highest bit. What is read back has one
number a dimension again. A table may keep cheaper forms of its vectors beside them, in columns of their own: what was
stored decides them, so that they need no encoder, and agree with it whatever way a vector came into the table.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from model.errors import InputError

TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "bits": pa.uint8()}
UNIT = ("int8", "bits")
"""Types that keep nothing of a vector's length."""


def check_type(vector_type: str, dim: int, *, normalize: bool) -> None:
    """Refuse what cannot be stored.

    Raises:
        InputError: an unknown type, one of unit vectors for others, bits that fill no whole bytes.
    """
    if vector_type not in TYPES:
        raise InputError(f"vector type {vector_type!r} is not known; use {', '.join(TYPES)}")
    if vector_type in UNIT and not normalize:
        raise InputError(f"{vector_type} vectors need unit length; set vectors.normalize=true, or store float16")
    if vector_type == "bits" and dim % 8:
        raise InputError(f"{dim} dimensions fill no whole bytes of bits; set vectors.dim to a multiple of 8")


def check_also(also: Sequence[str], vector_type: str, dim: int, *, normalize: bool) -> tuple[str, ...]:
    """The forms to keep beside the vectors, the cheapest last.

    Raises:
        InputError: one that takes as much room as the vectors themselves, or that cannot be stored.
    """
    order = list(TYPES)
    for name in also:
        check_type(name, dim, normalize=normalize)
        if name not in UNIT or order.index(name) <= order.index(vector_type):
            raise InputError(f"vectors.also has {name}, which is no cheaper form of {vector_type}; leave it out")
    return tuple(sorted(set(also), key=order.index))


def also_column(vector_type: str) -> str:
    """Name of the column with this form of the vectors."""
    return f"vector_{vector_type}"


def also_array(stored: pa.Array, stored_type: str, vector_type: str) -> pa.FixedSizeListArray:
    """A cheaper form of stored vectors: as `vector_array` gives it for the vectors that they stand for."""
    return vector_array(as_vectors(stored, stored_type), vector_type)


def column_type(dim: int, vector_type: str) -> pa.DataType:
    """The Arrow type of a column of vectors of `dim` dimensions."""
    return pa.list_(TYPES[vector_type], dim // 8 if vector_type == "bits" else dim)


def vector_array(vectors: np.ndarray, vector_type: str) -> pa.FixedSizeListArray:
    """(R, dim) float32 vectors as they are stored. [0.6, -0.8] has the bits 10, and is (95, -127) in int8."""
    if vector_type == "bits":
        rows = np.packbits(vectors > 0, axis=1)
    elif vector_type == "int8":
        rows = to_int8(vectors)
    else:
        rows = vectors.astype(vector_type)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])


def to_int8(vectors: np.ndarray) -> np.ndarray:
    """Each row in steps of a 127th of its largest component: a cosine does not see the scale. In steps of 1/127 for all
    rows, most of a unit vector of some hundred dimensions would fall on a dozen values.
    """
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)
    rows: np.ndarray = np.rint(vectors * (127 / np.maximum(largest, 1e-12))).astype(np.int8)
    return rows


def as_array(vectors: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(R, dim) numpy array of a vector column, in the type that it is stored in; bits as int8, -1 and 1."""
    flat = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    rows = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), flat.type.list_size)
    if rows.dtype != np.uint8:
        return rows
    return (np.unpackbits(rows, axis=1).astype(np.int8) << 1) - 1


def as_vectors(vectors: pa.ChunkedArray | pa.Array, vector_type: str) -> np.ndarray:
    """The same as the vectors that they stand for: float32, unit length again for the types that keep no length."""
    rows = as_array(vectors).astype(np.float32)
    if vector_type in UNIT:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows
