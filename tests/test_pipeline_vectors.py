"""Stored vectors: what comes back of each type, what is refused, and that bits find what floats find."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline import vectors as stored
from pipeline.vectors import TYPES, as_array, as_vectors, check_type, column_type, cosines, nearest, vector_array


def units(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("vector_type", "error"), [("float32", 0), ("float16", 5e-4), ("int8", 0.004)])
def test_numbers_come_back_within_rounding(vector_type: str, error: float) -> None:
    rows = units(20, 24)
    column = vector_array(rows, vector_type)
    assert column.type == column_type(24, vector_type)
    assert np.abs(as_vectors(column, vector_type) - rows).max() <= error


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1_000))
@settings(deadline=None, max_examples=30)
def test_bits_come_back_as_signs(rows: int, octets: int, seed: int) -> None:
    vectors = units(rows, 8 * octets, seed)
    column = vector_array(vectors, "bits")
    assert column.type == column_type(8 * octets, "bits") == pa.list_(pa.uint8(), octets)
    back = as_array(column)
    assert np.array_equal(back > 0, vectors > 0)
    assert np.allclose(as_vectors(column, "bits"), back / (8 * octets) ** 0.5)


def test_int8_uses_its_whole_range_for_every_vector() -> None:
    """Of 384 dimensions and of one that outweighs all; the direction is kept far better than by steps of 1/127."""
    rows = units(200, 384)
    rows[100:, 7] += 1.0
    kept = as_vectors(vector_array(rows, "int8"), "int8")
    stored = as_array(vector_array(rows, "int8")).astype(np.int32)
    assert (np.abs(stored).max(axis=1) == 127).all()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    coarse = np.rint(rows * 127)
    coarse /= np.linalg.norm(coarse, axis=1, keepdims=True)
    lost, lost_coarsely = 1 - (kept * rows).sum(axis=1), 1 - (coarse * rows).sum(axis=1)
    assert lost[:100].max() < 1e-4 < lost_coarsely[:100].min()
    assert (lost[100:] < lost_coarsely[100:]).all()


def test_a_vector_of_zeros_stays_one() -> None:
    zeros = np.zeros((2, 16), np.float32)
    assert not as_vectors(vector_array(zeros, "int8"), "int8").any()


def test_the_first_component_is_the_highest_bit() -> None:
    assert vector_array(np.array([[0.5, -1, 1, -1, -1, -1, -1, 0.1]], np.float32), "bits").to_pylist() == [[0b10100001]]


def test_an_empty_column_has_its_dimensions() -> None:
    for vector_type in TYPES:
        assert as_array(pa.array([], column_type(16, vector_type))).shape == (0, 16)


def test_what_cannot_be_stored() -> None:
    for vector_type in TYPES:
        check_type(vector_type, 16, normalize=True)
    with pytest.raises(InputError, match="is not known; use float32, float16, int8, bits"):
        check_type("float8", 16, normalize=True)
    for vector_type in ("int8", "bits"):
        with pytest.raises(InputError, match="unit length"):
            check_type(vector_type, 16, normalize=False)
    with pytest.raises(InputError, match="12 dimensions fill no whole bytes"):
        check_type("bits", 12, normalize=True)


def batches_of(vectors: np.ndarray, vector_type: str, size: int = 100) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    table = pa.table({"id": np.arange(len(vectors)), "vector": vector_array(vectors, vector_type)})
    return table.schema, table.to_batches(max_chunksize=size)


def test_bits_are_rescored_by_the_question_itself() -> None:
    """Every row is chosen and ordered as the two steps say, whatever the batches."""
    rows, question = units(500, 64), 3 * units(1, 64, seed=9)[0]
    differing = ((rows > 0) != (question > 0)).sum(axis=1)
    scores = cosines(np.where(rows > 0, 1, -1), question / np.linalg.norm(question))
    for size in (1, 37, 500):
        found = nearest(*batches_of(rows, "bits", size), ["id"], question, 5)
        ids = found["id"].to_numpy()
        assert len(ids) == 5
        assert differing[ids].max() <= np.sort(differing)[5 * stored.RESCORED]
        assert np.allclose(found["score"].to_numpy(), scores[ids], atol=1e-6)
        assert np.allclose(np.sort(found["score"].to_numpy())[::-1], found["score"].to_numpy())
    assert nearest(*batches_of(rows, "bits"), ["id"], question, 500)["id"].to_numpy()[0] == scores.argmax()


def test_rescoring_beats_bits_alone() -> None:
    """Clusters of near vectors: the question's own cosine orders those that differ in as many bits."""
    centres, rng = units(40, 128), np.random.default_rng(3)
    rows = np.repeat(centres, 25, axis=0) + 0.06 * rng.normal(size=(1_000, 128)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hits = {"rescored": 0, "bits": 0}
    for i in range(0, 1_000, 20):
        question = rows[i] + 0.03 * rng.normal(size=128).astype(np.float32)
        exact = set(np.argsort(-(rows @ question))[:10].tolist())
        found = nearest(*batches_of(rows, "bits"), ["id"], question, 10)["id"].to_pylist()
        differing = ((rows > 0) != (question > 0)).sum(axis=1)
        hits["rescored"] += len(exact & set(found))
        hits["bits"] += len(exact & set(np.argsort(differing, kind="stable")[:10].tolist()))
    assert hits["rescored"] > hits["bits"]


@pytest.mark.parametrize("vector_type", list(TYPES))
def test_nothing_is_found_in_nothing(vector_type: str) -> None:
    schema, _ = batches_of(units(2, 16), vector_type)
    assert len(nearest(schema, [], ["id"], units(1, 16)[0], 3)) == 0


def test_other_tools_read_bits_as_bytes(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = units(4, 16)
    pq.write_table(pa.table({"vector": vector_array(rows, "bits")}), tmp_path / "bits.parquet")
    frame = pl.read_parquet(tmp_path / "bits.parquet")
    assert frame.schema["vector"] == pl.Array(pl.UInt8, 2)
    assert np.array_equal(np.unpackbits(frame["vector"].to_numpy(), axis=1).astype(bool), rows > 0)


def test_a_recipe_with_bits_has_its_own_fingerprint() -> None:
    from test_pipeline_recipe import RECIPE

    assert replace(RECIPE, vector_type="bits").fingerprint() != replace(RECIPE, vector_type="int8").fingerprint()
