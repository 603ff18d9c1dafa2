"""Probes: what is kept of the canaries, what a sample of a table is, and how far off is too far."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, rows

from model.errors import InputError
from pipeline.columns import DocumentColumns, hash_texts
from pipeline.probes import (
    ARITHMETIC,
    FOLDER,
    MOST_CHARS,
    MOST_SAMPLED,
    STORAGE,
    TEXTS,
    Probes,
    distance,
    document_table,
    from_bytes,
    keep_canaries,
    make_probes,
    read_canaries,
    to_bytes,
)
from pipeline.storage import list_sources
from pipeline.table import EmbeddingTable, write_fragment

COLUMNS = DocumentColumns()


def table_with(tmp_path, texts: dict[str, str], source: str) -> EmbeddingTable:
    """A table that holds these documents; a vector holds the length of its text."""
    table = EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")
    made = rows(texts)
    hashes = hash_texts(pa.array([texts[name] for name in made["document_id"].to_pylist()], pa.large_string()))
    made = made.set_column(made.column_names.index("text_hash"), "text_hash", hashes)
    made = made.set_column(made.column_names.index("source"), "source", pa.array([source] * len(made)))
    table.commit([write_fragment(table.uri, made, "r0")], table.keys().ids, table.keys(), run="r0")
    return table


def write(path, texts: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    return str(path)


def test_the_first_probes_are_canaries_only(tmp_path):
    table = EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")
    probes = make_probes(table.uri, RECIPE, table.dataset, [], COLUMNS, "r1")
    assert probes.documents["text"].to_pylist() == list(TEXTS)
    assert (probes.canaries, probes.sample) == (None, {})
    assert probes.bound == ARITHMETIC[RECIPE.dtype] + STORAGE[RECIPE.vector_type]
    assert probes.check({}) == {}


def test_canaries_are_kept_with_their_texts(tmp_path):
    found = {("canary-0", -1): np.array([0.1, 0.25], np.float32), ("sample-0", -1): np.array([1, 2], np.float32)}
    table = str(tmp_path / "table.lance")
    keep_canaries(table, "f1", ["an older text"], found)
    texts, kept = read_canaries(table, "f1")
    assert texts == ["an older text"]
    assert list(kept) == [("canary-0", -1)]
    assert kept["canary-0", -1].astype(np.float32).tolist() == found["canary-0", -1].tolist()
    assert read_canaries(table, "f2") == (TEXTS, None)
    (tmp_path / "table.lance" / FOLDER / "f1.json").write_text("{}")
    with pytest.raises(InputError, match="canaries"):
        read_canaries(table, "f1")


def test_sample_is_of_documents_whose_text_is_at_hand(tmp_path):
    texts = {f"d{i}": "x" * (i + 1) for i in range(30)}
    source = write(tmp_path / "a.jsonl", texts)
    table = table_with(tmp_path, texts, source)
    write(tmp_path / "a.jsonl", texts | {f"d{i}": "changed since" for i in range(20)})
    files = list_sources(source)
    draws = set()
    for run in ("r1", "r2", "r3"):
        probes = make_probes(table.uri, RECIPE, table.dataset, files, COLUMNS, run)
        sampled = probes.documents.slice(len(TEXTS)).to_pylist()
        assert 0 < len(sampled) <= MOST_SAMPLED
        for row in sampled:
            assert texts[probes.names[row["document_id"]]] == row["text"]
            assert int(probes.names[row["document_id"]][1:]) >= 20
            (vector, *_) = [v for (name, _), v in probes.sample.items() if name == row["document_id"]]
            assert vector[0] == len(row["text"])
        draws.add(frozenset(probes.names.values()))
        assert make_probes(table.uri, RECIPE, table.dataset, files, COLUMNS, run).names == probes.names
    assert len(draws) > 1
    assert make_probes(table.uri, RECIPE, table.dataset, [], COLUMNS, "r1").sample == {}
    # A source that is gone by now is no reason to stop.
    (tmp_path / "a.jsonl").unlink()
    assert make_probes(table.uri, RECIPE, table.dataset, files, COLUMNS, "r1").sample == {}


def test_long_texts_are_not_sampled(tmp_path):
    texts = {f"d{i}": "y" * MOST_CHARS * (1 + i % 2) for i in range(6)}
    source = write(tmp_path / "a.jsonl", texts)
    table = table_with(tmp_path, texts, source)
    probes = make_probes(table.uri, RECIPE, table.dataset, list_sources(source), COLUMNS, "r1")
    assert len(probes.names) == 1
    assert len(probes.documents["text"][len(TEXTS)].as_py()) == MOST_CHARS


def test_distance():
    a = np.array([1, 2, 2], np.float32)
    assert distance(a, a * 3) == pytest.approx(0, abs=1e-12)
    assert distance(a, -a) == pytest.approx(2)
    assert distance(a, np.array([2, -1, 0], np.float32)) == pytest.approx(1)
    assert distance(np.array([100, -127], np.int8), np.array([100, -127], np.int8)) == pytest.approx(0, abs=1e-12)
    for other in (None, np.zeros(3), np.ones(2), a * np.nan):
        assert distance(a, other) == 2


def probes_of(canaries: dict | None, sample: dict) -> Probes:
    return Probes(["t"], document_table(["canary-0"], ["t"]), canaries, sample, {"sample-0": "d7"}, 1e-6)


def test_check_names_the_farthest():
    canary, known = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    probes = probes_of({("canary-0", 0): canary, ("canary-0", 1): known}, {("sample-0", 4): known})
    right = {("canary-0", 0): canary, ("canary-0", 1): known, ("sample-0", 4): known, ("sample-0", 5): canary}
    assert probes.check(right) == {"canaries": (0, "canary-0"), "sample": (0, "d7")}
    moved = probes.check(right | {("sample-0", 4): np.array([1.0, 1.0])})
    assert moved["sample"] == (pytest.approx(1 - 0.5**0.5), "d7")
    # A tokenizer that makes other chunks of a text shows in a vector that is missing, or one too many.
    assert probes.check({k: v for k, v in right.items() if k != ("canary-0", 1)})["canaries"] == (2, "canary-0")
    assert probes.check(right | {("canary-0", 2): canary})["canaries"] == (2, "canary-0")


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_vectors_travel(kind):
    values = np.arange(8).astype(kind)
    table = pa.table(
        {
            "document_id": ["a", "b"],
            "chunk": pa.array([-1, 3], pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(values), 4),
            "other": [1, 2],
        }
    )
    found = from_bytes(to_bytes(table))
    assert {key: vector.tolist() for key, vector in found.items()} == {("a", -1): [0, 1, 2, 3], ("b", 3): [4, 5, 6, 7]}


def test_bounds_follow_the_recipe(tmp_path):
    table = EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")
    recipe = replace(RECIPE, dtype="bfloat16", vector_type="int8")
    assert make_probes(table.uri, recipe, table.dataset, [], COLUMNS, "r").bound > 1e-3


def test_canaries_on_s3(s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    table = "s3://bucket/probes/table.lance"
    assert read_canaries(table, "f1") == (TEXTS, None)
    keep_canaries(table, "f1", ["t"], {("canary-0", -1): np.ones(2)})
    texts, kept = read_canaries(table, "f1")
    assert (texts, {key: vector.tolist() for key, vector in kept.items()}) == (["t"], {("canary-0", -1): [1, 1]})
