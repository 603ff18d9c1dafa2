"""Which rows of a table come closest to a question: every row is compared, in its own form or in a cheaper one first.

Bits and int8 choose among all rows, at a thirty-second and a quarter of what float32 takes to read; of what they chose,
the best stored form says the order. What that loses, `nightloom evaluate` measures.
"""

from collections.abc import Iterable, Sequence

import lance
import numpy as np
import pyarrow as pa

from pipeline.vectors import also_column, as_array

RESCORED = {"int8": 2, "bits": 8}
"""So many times k rows are chosen by these forms before the order is made."""


def search(dataset: lance.LanceDataset, question: np.ndarray, k: int, also: Sequence[str] = ()) -> pa.Table:
    """The `k` rows with the highest cosine to a question, best first.

    Args:
        question: float of shape (dim,), of any length.
        also: cheaper forms of the vectors that the table keeps, the cheapest last; it chooses.

    Returns:
        The columns but those of vectors, and `score` (float32, the cosine). Ties stand in the order of ids.
    """
    schema = dataset.schema
    vectors = {"vector", *map(also_column, also)}
    columns = [name for name in schema.names if name not in vectors]
    kind = schema.field("vector").type.value_type
    if pa.types.is_floating(kind) and not also:
        query = {"column": "vector", "q": question.astype(kind.to_pandas_dtype()), "k": k, "metric": "cosine"}
        found = dataset.scanner(columns=[*columns, "_distance"], nearest=query | {"use_index": False}).to_table()
        scores = np.clip(1 - found["_distance"].to_numpy(), -1, 1)
        found = found.drop_columns("_distance").append_column("score", pa.array(scores, pa.float32()))
    else:  # Lance compares floats only
        batches = dataset.to_batches(columns=[also_column(also[-1]) if also else "vector"])
        # Vectors of int8 are chosen by what orders them, the others by less.
        times = RESCORED[also[-1]] if also else RESCORED["bits"] if pa.types.is_uint8(kind) else 1
        places = chosen(batches, question, times * k)
        found = ranked(dataset.take(places.tolist(), columns=[*columns, "vector"]), question, k)
    return found.sort_by([("score", "descending"), ("document_id", "ascending"), ("chunk", "ascending")])


def chosen(batches: Iterable[pa.RecordBatch], question: np.ndarray, count: int) -> np.ndarray:
    """Places, ascending, of the rows of a column of vectors that come closest; earlier ones where they are alike."""
    unit, bits = prepared(question)
    likeness, places, first = np.empty(0, np.float32), np.empty(0, np.int64), 0
    for batch in batches:
        likeness = np.append(likeness, roughly(batch.column(0), unit, bits))
        places = np.append(places, np.arange(first, first + len(batch)))
        first += len(batch)
        best = np.argsort(-likeness, kind="stable")[:count]
        likeness, places = likeness[best], places[best]
    return np.sort(places)


def ranked(rows: pa.Table, question: np.ndarray, k: int) -> pa.Table:
    """The `k` of some rows with the highest cosine to a question, as `score` in place of `vector`.

    Of bits, it is the cosine of the question itself, not of its bits, with the row's signs.
    """
    unit, _ = prepared(question)
    scores = cosines(as_array(rows["vector"].combine_chunks()), unit)
    rows = rows.drop_columns("vector").append_column("score", pa.array(scores, pa.float32()))
    return rows.sort_by([("score", "descending")])[:k]


def prepared(question: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A question at unit length, and the signs of its components."""
    unit = (question / max(float(np.linalg.norm(question)), 1e-12)).astype(np.float32)
    return unit, np.packbits(unit > 0)


def roughly(stored: pa.Array, unit: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """What orders stored vectors before the question itself does: cosines, of bits the number that differ, negative."""
    if not pa.types.is_uint8(stored.type.value_type):
        return cosines(as_array(stored), unit)
    raw = stored.flatten().to_numpy().reshape(len(stored), len(bits))
    differing: np.ndarray = -np.bitwise_count(raw ^ bits).sum(axis=1, dtype=np.int64).astype(np.float32)
    return differing


def cosines(rows: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """float32 cosines of rows of any length with a unit vector; 0 for a row of zeros."""
    rows = rows.astype(np.float32)
    found: np.ndarray = rows @ unit / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    return found
