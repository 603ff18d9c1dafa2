"""Documents as keys: 128-bit hashes of ids and texts, in sorted numpy arrays.

What a table holds is too much for a dictionary of strings: here a document costs 40 bytes, lies in Ray's object store
once for each node, and is looked up without being copied.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

KEY = np.dtype("S16")
"""128-bit hashes as fixed bytes. numpy compares them like memcmp, because all have the full length."""


def hash_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """128-bit hashes (S16) of document ids, in their order."""
    raw = ids.cast(pa.large_binary()).to_pylist()
    digests = b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in raw)
    return np.frombuffer(digests, dtype=KEY)


def as_keys(hashes: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A `fixed_size_binary[16]` column without nulls as a numpy array of S16."""
    array = hashes.combine_chunks() if isinstance(hashes, pa.ChunkedArray) else hashes
    return np.frombuffer(array.buffers()[1], dtype=KEY, count=len(array), offset=array.offset * KEY.itemsize)


def is_among(wanted: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """For each of `wanted` whether it stands in the sorted array `ordered`."""
    if not len(ordered):
        return np.zeros(len(wanted), dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)] == wanted


@dataclass(frozen=True, slots=True)
class Keys:
    """What a table holds, sorted by id: one entry for each document and each fragment that has rows of it."""

    ids: np.ndarray
    """S16, hashes of document ids, ascending."""
    hashes: np.ndarray
    """S16, the hash of the text each was embedded from."""
    fragments: np.ndarray
    """int64, the fragment that holds its rows."""

    def known(self, ids: np.ndarray) -> np.ndarray:
        """For each of `ids` whether the table holds that document."""
        return is_among(ids, self.ids)

    def unchanged(self, ids: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """For each document whether the table holds it with this very text."""
        if not len(self.ids):
            return np.zeros(len(ids), dtype=bool)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return (self.ids[at] == ids) & (self.hashes[at] == hashes)

    def fragments_of(self, ids: np.ndarray) -> set[int]:
        """The fragments that hold rows of any of `ids`."""
        return set(self.fragments[is_among(self.ids, np.sort(ids))].tolist())

    def take(self, at: np.ndarray) -> "Keys":
        """The entries at these places, which ascend."""
        return Keys(self.ids[at], self.hashes[at], self.fragments[at])

    @classmethod
    def join(cls, parts: "Sequence[Keys]") -> "Keys":
        """All entries, sorted again."""
        ids = np.concatenate([np.empty(0, KEY), *(part.ids for part in parts)])
        hashes = np.concatenate([np.empty(0, KEY), *(part.hashes for part in parts)])
        fragments = np.concatenate([np.empty(0, np.int64), *(part.fragments for part in parts)])
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], hashes[order], fragments[order])

    @classmethod
    def empty(cls) -> "Keys":
        return cls(np.empty(0, KEY), np.empty(0, KEY), np.empty(0, np.int64))
