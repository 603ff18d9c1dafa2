"""Stored vectors: what comes back of each type, what is refused, and the cheaper forms beside them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.vectors import (
    TYPES,
    also_array,
    as_array,
    as_vectors,
    check_also,
    check_type,
    column_type,
    vector_array,
)


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


def test_cheaper_forms_are_those_of_what_is_stored() -> None:
    rows = units(50, 24)
    for stored, also in (("float32", "int8"), ("float32", "bits"), ("float16", "int8"), ("int8", "bits")):
        column = vector_array(rows, stored)
        assert also_array(column, stored, also).equals(vector_array(as_vectors(column, stored), also))
    assert also_array(vector_array(rows, "float32"), "float32", "bits").equals(vector_array(rows, "bits"))


def test_forms_that_are_no_cheaper_are_refused() -> None:
    assert check_also(["bits", "int8", "bits"], "float16", 24, normalize=True) == ("int8", "bits")
    assert check_also([], "bits", 24, normalize=False) == ()
    for also, stored in (("int8", "int8"), ("int8", "bits"), ("bits", "bits"), ("float16", "float32")):
        with pytest.raises(InputError, match=f"vectors.also has {also}, which is no cheaper form of {stored}"):
            check_also([also], stored, 24, normalize=True)
    with pytest.raises(InputError, match="int8 vectors need unit length"):
        check_also(["int8"], "float32", 24, normalize=False)
    with pytest.raises(InputError, match="12 dimensions fill no whole bytes"):
        check_also(["bits"], "float32", 12, normalize=True)
