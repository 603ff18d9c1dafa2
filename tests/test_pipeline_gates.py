"""Gates: every way in which vectors can be wrong is noticed, and only what readers do not see yet is looked at."""

from dataclasses import replace

import lance
import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, rows

from pipeline import gates
from pipeline.columns import hash_texts
from pipeline.gates import FEWEST_TEXTS, check_vectors, hash_vectors, norm_tolerance, scan, unpublished_fragments
from pipeline.keys import hash_ids
from pipeline.table import EmbeddingTable, write_fragment
from pipeline.vectors import to_int8, vector_array

DIM = 16
DOCUMENTS = 3 * FEWEST_TEXTS
KINDS = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(vectors: np.ndarray, vector_type: str) -> pa.Array:
    values = to_int8(vectors) if vector_type == "int8" else vectors
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(KINDS[vector_type]).ravel()), DIM)


@pytest.fixture
def make(tmp_path):
    def make(vector_type: str = "float32", **recipe) -> EmbeddingTable:
        made = replace(RECIPE, dim=DIM, vector_type=vector_type, normalize=True)
        return EmbeddingTable.create(str(tmp_path / f"{vector_type}.lance"), replace(made, **recipe), model="m")

    return make


def add(table: EmbeddingTable, vectors: np.ndarray, prefix: str = "d", texts: list[str] | None = None) -> None:
    """One document, one row for each vector, as a fragment that is committed."""
    names = [f"{prefix}{i}" for i in range(len(vectors))]
    made = rows(dict.fromkeys(names, "t"), chunks=1)
    made = made.set_column(made.column_names.index("vector"), "vector", stored(vectors, table.recipe.vector_type))
    hashes = hash_texts(pa.array(texts or names, pa.large_string()))
    made = made.set_column(made.column_names.index("text_hash"), "text_hash", hashes)
    keys = table.keys()
    table.commit([write_fragment(table.uri, made, "r")], keys.ids[:0], keys, run="r")


def names_in(table: EmbeddingTable) -> set[str]:
    return set(lance.dataset(table.uri).to_table(columns=["document_id"])["document_id"].to_pylist())


@pytest.mark.parametrize("vector_type", list(KINDS))
def test_good_vectors_pass(make, vector_type):
    table = make(vector_type)
    add(table, unit_vectors(DOCUMENTS))
    version = table.version
    verdict = check_vectors(table, (), run="r")
    assert (verdict.refused, verdict.removed, table.version) == ([], 0, version)
    assert verdict.measured["rows"] == verdict.measured["texts_compared"] == DOCUMENTS
    assert verdict.measured["farthest_length"] <= norm_tolerance(vector_type)
    assert verdict.measured["dead_dimensions"] == verdict.measured["identical"] == 0
    assert verdict.measured["smallest_variance"] > 0.5


def test_vectors_that_are_not_finite_are_taken_out(make):
    table = make()
    vectors = unit_vectors(10)
    vectors[3, 5], vectors[7, 0] = np.nan, np.inf
    add(table, vectors)
    add(table, unit_vectors(3), prefix="other")
    verdict = check_vectors(table, (), run="r")
    assert len(verdict.refused) == 1
    assert verdict.refused[0].startswith("vectors: of 13 2 are not finite, 0 not of length 1")
    assert verdict.removed == 2
    assert names_in(table) == {f"d{i}" for i in range(10)} - {"d3", "d7"} | {"other0", "other1", "other2"}
    # The next look finds nothing wrong with what is left.
    assert check_vectors(table, (), run="r").refused == []


def test_vectors_of_another_length_are_taken_out(make):
    table = make()
    vectors = unit_vectors(10)
    vectors[4] *= 1.01
    add(table, vectors)
    assert check_vectors(table, ["vectors"], run="r").refused == []
    verdict = check_vectors(table, (), run="r")
    assert "1 not of length 1 (off by up to 0.01)" in verdict.refused[0]
    assert "d4" not in names_in(table)


def test_cheaper_forms_that_are_not_the_vectors_are_taken_out(make, monkeypatch):
    table = make("float16", also=("int8", "bits"))
    add(table, unit_vectors(10))
    assert check_vectors(table, (), run="r").refused == []
    monkeypatch.setattr("pipeline.table.also_array", lambda column, kind, name: vector_array(unit_vectors(3), name))
    add(table, unit_vectors(3, seed=1), prefix="other")
    verdict = check_vectors(table, (), run="r")
    assert "of 13 0 are not finite" in verdict.refused[0]
    assert ", 3 unlike a cheaper form beside them; their 3 documents are taken out" in verdict.refused[0]
    assert names_in(table) == {f"d{i}" for i in range(10)}


def test_no_length_is_promised_without_normalisation(make):
    table = make(normalize=False)
    add(table, unit_vectors(10) * 3)
    assert check_vectors(table, (), run="r").refused == []


@pytest.mark.parametrize("vector_type", list(KINDS))
def test_rounding_is_no_fault(make, vector_type):
    """The worst that rounding can do to a unit vector stays within the tolerance."""
    table = make(vector_type)
    draw = np.random.default_rng(1)
    vectors = np.concatenate([np.full((1, DIM), DIM**-0.5), unit_vectors(2000), draw.random((500, DIM))]).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    add(table, vectors)
    assert check_vectors(table, (), run="r").refused == []


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (np.tile(unit_vectors(1), (DOCUMENTS, 1)), "100.0% of the vectors are also that of another text"),
        (unit_vectors(3)[np.arange(DOCUMENTS) % 3], "100.0% of the vectors"),
        (np.concatenate([unit_vectors(DOCUMENTS // 3), np.tile(unit_vectors(1, 9), (DOCUMENTS * 2 // 3, 1))]), "66.7%"),
    ],
)
def test_collapse_onto_few_vectors(make, vectors, says):
    table = make()
    add(table, vectors)
    verdict = check_vectors(table, (), run="r")
    assert says in verdict.refused[0]
    assert verdict.removed == 0
    assert len(names_in(table)) == DOCUMENTS
    assert check_vectors(table, ["collapse"], run="r").refused == []


def test_collapse_into_a_narrow_cone(make):
    table = make()
    vectors = unit_vectors(1, 5) + 0.02 * unit_vectors(DOCUMENTS)
    add(table, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    verdict = check_vectors(table, (), run="r")
    assert "100.0% of the dimensions hardly vary" in verdict.refused[0]


def test_few_texts_and_repeated_texts_are_no_collapse(make):
    table = make()
    add(table, np.tile(unit_vectors(1), (FEWEST_TEXTS - 1, 1)))
    assert check_vectors(table, (), run="r").refused == []
    table = make("float16")
    vectors = unit_vectors(DOCUMENTS // 2)
    texts = [f"text {i % (DOCUMENTS // 2)}" for i in range(DOCUMENTS)]
    add(table, np.concatenate([vectors, vectors]), texts=texts)
    verdict = check_vectors(table, (), run="r")
    assert (verdict.refused, verdict.measured["identical"]) == ([], 0)


def test_only_what_readers_do_not_see_is_looked_at(make):
    table = make()
    bad = unit_vectors(5)
    bad[2] = np.nan
    add(table, bad, prefix="old")
    table.publish()
    assert unpublished_fragments(table) == []
    add(table, unit_vectors(4), prefix="new")
    # Rows that go from a published fragment do not make it new.
    table.commit([], hash_ids(pa.array(["old1"])), table.keys(), run="r")
    assert len(unpublished_fragments(table)) == 1
    verdict = check_vectors(table, (), run="r")
    assert (verdict.refused, verdict.measured["rows"]) == ([], 4)


def test_a_column_that_is_not_the_recipes(make):
    table = make()
    table.recipe = replace(table.recipe, dim=8)
    assert "the recipe promises" in check_vectors(table, (), run="r").refused[0]


def test_statistics_add_up_over_fragments_and_their_order(make, monkeypatch):
    table = make()
    for part in range(5):
        add(table, unit_vectors(400, part), prefix=f"p{part}-")
    ids = [fragment.fragment_id for fragment in table.dataset.get_fragments()]
    monkeypatch.setattr(gates, "MOST_COMPARED", 500)
    whole = scan(table.uri, table.version, ids, table.recipe)
    parts = scan(table.uri, table.version, ids[3:], table.recipe)
    parts.add(scan(table.uri, table.version, ids[:3], table.recipe))
    assert whole.rows == parts.rows == 2000
    np.testing.assert_allclose(whole.squares_D, parts.squares_D)
    assert whole.compared.shape == (3, 500)
    assert sorted(whole.compared[0].tolist()) == sorted(parts.compared[0].tolist())
    assert whole.identical() == parts.identical() == (0, 500)


def test_hashes_tell_vectors_apart():
    vectors = unit_vectors(20_000)
    assert len(np.unique(hash_vectors(vectors))) == 20_000
    changed = vectors.copy()
    changed[:, 3] = np.nextafter(changed[:, 3], 2, dtype=np.float32)
    assert not np.isin(hash_vectors(changed), hash_vectors(vectors)).any()
    assert (hash_vectors(vectors.copy()) == hash_vectors(vectors)).all()


@pytest.mark.usefixtures("ray_session")
def test_many_rows_are_read_by_tasks(make, monkeypatch):
    table = make()
    for part in range(4):
        add(table, unit_vectors(100, part), prefix=f"p{part}-")
    here = check_vectors(table, (), run="r").measured
    monkeypatch.setattr(gates, "ROWS_PER_TASK", 150)
    assert check_vectors(table, (), run="r").measured == here
