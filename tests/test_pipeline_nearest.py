"""Search: the rows that come closest, whatever the form, the batches and the deletions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, rows
from test_pipeline_vectors import units

from pipeline.keys import Keys, hash_ids
from pipeline.nearest import RESCORED, chosen, cosines, ranked
from pipeline.table import EmbeddingTable, write_fragment
from pipeline.vectors import TYPES, vector_array


def table_of(vectors: np.ndarray, vector_type: str) -> pa.Table:
    return pa.table({"id": np.arange(len(vectors)), "vector": vector_array(vectors, vector_type)})


def nearest(vectors: np.ndarray, form: str, question: np.ndarray, k: int, size: int = 100) -> pa.Table:
    """The two steps of a search, over batches of `size` rows."""
    table = table_of(vectors, form)
    batches = table.select(["vector"]).to_batches(max_chunksize=size)
    return ranked(table.take(chosen(batches, question, RESCORED.get(form, 1) * k)), question, k)


def test_bits_are_rescored_by_the_question_itself() -> None:
    """Every row is chosen and ordered as the two steps say, whatever the batches."""
    rows, question = units(500, 64), 3 * units(1, 64, seed=9)[0]
    differing = ((rows > 0) != (question > 0)).sum(axis=1)
    scores = cosines(np.where(rows > 0, 1, -1), question / np.linalg.norm(question))
    for size in (1, 37, 500):
        found = nearest(rows, "bits", question, 5, size)
        ids = found["id"].to_numpy()
        assert len(ids) == 5
        assert differing[ids].max() <= np.sort(differing)[5 * RESCORED["bits"]]
        assert np.allclose(found["score"].to_numpy(), scores[ids], atol=1e-6)
        assert np.allclose(np.sort(found["score"].to_numpy())[::-1], found["score"].to_numpy())
    assert nearest(rows, "bits", question, 500)["id"].to_numpy()[0] == scores.argmax()


def test_rescoring_beats_bits_alone() -> None:
    """Clusters of near vectors: the question's own cosine orders those that differ in as many bits."""
    centres, rng = units(40, 128), np.random.default_rng(3)
    rows = np.repeat(centres, 25, axis=0) + 0.06 * rng.normal(size=(1_000, 128)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hits = {"rescored": 0, "bits": 0}
    for i in range(0, 1_000, 20):
        question = rows[i] + 0.03 * rng.normal(size=128).astype(np.float32)
        exact = set(np.argsort(-(rows @ question))[:10].tolist())
        found = nearest(rows, "bits", question, 10)["id"].to_pylist()
        differing = ((rows > 0) != (question > 0)).sum(axis=1)
        hits["rescored"] += len(exact & set(found))
        hits["bits"] += len(exact & set(np.argsort(differing, kind="stable")[:10].tolist()))
    assert hits["rescored"] > hits["bits"]


@pytest.mark.parametrize("vector_type", list(TYPES))
def test_nothing_is_found_in_nothing(vector_type: str) -> None:
    question = units(1, 16)[0]
    assert len(chosen([], question, 3)) == 0
    assert len(nearest(units(2, 16)[:0], vector_type, question, 3)) == 0


@pytest.mark.parametrize("form", ["int8", "bits"])
def test_the_cheaper_form_chooses_whatever_the_batches(form: str) -> None:
    vectors, question = units(300, 32), 5 * units(1, 32, seed=4)[0]
    found = []
    for size in (1, 41, 300):
        batches = table_of(vectors, form).select(["vector"]).to_batches(max_chunksize=size)
        found.append(chosen(batches, question, 20).tolist())
    assert found[0] == found[1] == found[2] == sorted(found[0])
    assert len(found[0]) == 20
    exact = np.argsort(-(vectors @ question))
    if form == "int8":
        assert set(exact[:15]) <= set(found[0])  # int8 is close
    else:
        differing = ((vectors > 0) != (question > 0)).sum(axis=1)
        assert differing[found[0]].sum() == np.sort(differing)[:20].sum()


@pytest.mark.parametrize("also", [("int8",), ("bits",), ("int8", "bits")])
def test_a_table_with_cheaper_forms_orders_by_its_vectors(tmp_path: Path, also: tuple[str, ...]) -> None:
    """Deletions in between: places of rows are those of the rows that are left."""
    recipe = replace(RECIPE, dim=64, also=also)
    table = EmbeddingTable.create(str(tmp_path / "t"), recipe, model="m")
    vectors, none = units(400, 64), hash_ids(pa.array([], pa.string()))
    for part in (range(150), range(150, 400)):
        given = rows({f"{i:03}": "x" for i in part}, chunks=1)
        column = vector_array(vectors[part.start : part.stop], "float32")
        given = given.set_column(given.column_names.index("vector"), "vector", column)
        table.commit([write_fragment(table.uri, given, "r")], none, Keys.empty(), run="r")
    gone = [*range(0, 400, 7), 3, 151]
    table.commit([], hash_ids(pa.array([f"{i:03}" for i in sorted(set(gone))])), table.keys(), run="r")
    left = np.setdiff1d(np.arange(400), gone)
    stored = EmbeddingTable.open(table.uri).dataset.to_table()
    for name in also:
        assert stored[f"vector_{name}"].combine_chunks().equals(vector_array(vectors[left], name))
    question = vectors[200] + 0.05 * units(1, 64, seed=7)[0]
    found = table.search(question, 5)
    scores = vectors @ question / np.linalg.norm(question)
    places = [int(name) for name in found["document_id"].to_pylist()]
    assert places[0] == 200
    assert not set(places) & set(gone)
    np.testing.assert_allclose(found["score"].to_numpy(), scores[places], atol=1e-5)
    assert found["score"].to_pylist() == sorted(found["score"].to_pylist(), reverse=True)
    assert not [name for name in found.column_names if name.startswith("vector")]
    assert len(table.search(question, 1_000)) == len(left)
    exact = left[np.argsort(-scores[left])][:5]
    assert len(set(places) & set(exact.tolist())) >= 4


def test_a_table_without_rows_gives_none(tmp_path: Path) -> None:
    table = EmbeddingTable.create(str(tmp_path / "t"), replace(RECIPE, dim=64, also=("bits",)), model="m")
    assert len(table.search(units(1, 64)[0], 3)) == 0
