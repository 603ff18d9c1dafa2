"""Preparation: every document is accounted for, shards follow from the source alone, sentences are where they begin."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline import preparation
from pipeline.columns import DocumentColumns
from pipeline.keys import KEY
from pipeline.preparation import (
    Documents,
    choose_documents,
    make_tasks,
    plan_shards,
    read_parts,
    tokenize,
    write_shards,
)
from pipeline.shards import ShardEntry, read_shard
from pipeline.sources import DEAD, EMPTY, TEXT, Holding, read_part, split_files
from pipeline.storage import SourceFile, list_sources
from pipeline.vocabulary import copy_tokenizer, corpus_tokenizer, read_vocabulary

COLUMNS = DocumentColumns()


def holding(number: int, first_row: int, ids: list[int], texts: list[int], kinds: list[int]) -> Holding:
    """Documents whose hashes are drawn from small numbers."""

    def hashes(numbers: list[int]) -> np.ndarray:
        return np.frombuffer(b"".join(np.random.default_rng(n).bytes(16) for n in numbers), KEY)

    sizes = np.array([n * 10 + 1 for n in texts], np.int32)
    return Holding(number, first_row, hashes(ids), hashes(texts), sizes, np.array(kinds, np.uint8), [])


corpora = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(10, 16), st.sampled_from([TEXT, TEXT, EMPTY, DEAD])), max_size=9),
    min_size=1,
    max_size=5,
)


@given(corpora, st.sampled_from([0.0, 0.3, 0.9]), st.integers(1, 900))
@settings(max_examples=60, deadline=None)
def test_every_document_is_accounted_for(
    corpus: list[list[tuple[int, int, int]]], held_out: float, bytes_per_shard: int
) -> None:
    holdings = [
        holding(number, 0, [i for i, _, _ in rows], [t for _, t, _ in rows], [k for _, _, k in rows])
        for number, rows in enumerate(corpus)
        if rows
    ]
    documents = choose_documents(holdings[::-1], held_out)
    counts = dict(documents.counts)
    assert counts.pop("read") == sum(counts.values()) == sum(map(len, corpus))
    # The first of equal texts, in the order of the source.
    seen: dict[int, tuple[int, int]] = {}
    for number, rows in enumerate(corpus):
        for row, (_, text, kind) in enumerate(rows):
            if kind == TEXT:
                seen.setdefault(text, (number, row))
    assert list(zip(documents.file_D.tolist(), documents.row_D.tolist(), strict=True)) == sorted(seen.values())
    plans = plan_shards(documents, bytes_per_shard)
    places = np.concatenate([np.empty(0, np.int64), *(plan.places for plan in plans)])
    assert sorted(places.tolist()) == list(range(len(documents.file_D)))
    for plan in plans:
        assert plan.bytes <= bytes_per_shard or len(plan.places) == 1
        assert (documents.held_out_D[plan.places] == plan.name.startswith("heldout")).all()
        assert (np.diff(plan.places) > 0).all()


def test_the_held_out_share_is_chosen_by_id() -> None:
    many = holding(0, 0, list(range(3000)), list(range(3000)), [TEXT] * 3000)
    out = choose_documents([many], 0.1)
    assert out.held_out_D.mean() == pytest.approx(0.1, abs=0.02)
    # The same ids, other texts, other places: the same are held out.
    moved = holding(3, 17, list(range(3000)), list(range(5000, 8000)), [TEXT] * 3000)
    assert np.array_equal(choose_documents([moved], 0.1).held_out_D, out.held_out_D)
    wider = choose_documents([many], 0.2).held_out_D
    assert wider[out.held_out_D].all()
    assert not choose_documents([many], 0.0).held_out_D.any()


def test_the_fingerprint_is_of_documents_and_settings() -> None:
    def fingerprint(texts: list[int], ids: list[int], heldout: float = 0.1) -> str:
        return choose_documents([holding(0, 0, ids, texts, [TEXT] * len(ids))], 0.1).fingerprint({"heldout": heldout})

    first = fingerprint([10, 11], [0, 1])
    assert first == fingerprint([10, 11], [0, 1])
    others = {fingerprint([11, 10], [0, 1]), fingerprint([10, 11], [0, 2]), fingerprint([10, 11], [0, 1], 0.2)}
    assert len(others | {first}) == 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of three kinds; texts of some sentences each."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [f"Document {i} begins. It goes on here! Does it end?\n\n" + "More words follow. " * i for i in range(40)]
    pq.write_table(pa.table({"id": [f"p{i}" for i in range(20)], "text": texts[:20]}), folder / "a.parquet")
    lines = [json.dumps({"id": f"j{i}", "text": text}) for i, text in enumerate(texts[18:35])]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(35, 40):
        (folder / f"c{i}.txt").write_text(texts[i])
    return folder


def prepared(source: Path) -> tuple[list[SourceFile], Documents]:
    files = list_sources(str(source))
    return files, choose_documents([read_part(p, COLUMNS) for p in split_files(enumerate(files), COLUMNS)], 0.1)


def test_shards_hold_the_documents_and_their_sentences(
    source: Path, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    uri = str(tmp_path / "tokens")
    copy_tokenizer(tiny_tokenizer_folder, uri)
    vocabulary = read_vocabulary(tiny_tokenizer_folder)
    files, documents = prepared(source)
    assert documents.counts["duplicate"] == 2
    plans = plan_shards(documents, 3000)
    tasks = make_tasks(plans, documents, files)
    assert len(plans) > 5
    records = [
        json.loads(row)
        for task in tasks
        for table in write_shards(
            task, uri=uri, columns=COLUMNS, tokenizer_hash=vocabulary.hash, vocab_size=400, fingerprint="f"
        )
        for row in table["record"].to_pylist()
    ]
    assert [record["entry"]["name"] for record in records] == [plan.name for plan in plans]
    tokenizer = corpus_tokenizer(uri)
    found = []
    for record, plan in zip(records, plans, strict=True):
        entry = ShardEntry(**record["entry"])
        shard = read_shard(tmp_path / "tokens" / entry.name)
        assert (entry.documents, entry.tokens) == (len(plan.places), len(shard.tokens_N))
        assert sum(record["lengths"].values()) == entry.documents
        assert shard.tokens_N.dtype == np.uint16
        for d in range(entry.documents):
            tokens = shard.tokens_N[shard.offsets_D[d] : shard.offsets_D[d + 1]]
            text = tokenizer.decode(tokens.tolist())
            found.append(text)
            starts = shard.sentences[shard.sentence_offsets_D[d] : shard.sentence_offsets_D[d + 1]]
            assert starts[0] == 0
            for start in starts[1:].tolist():
                before = tokenizer.decode(tokens[:start].tolist()).rstrip()
                assert before.endswith((".", "!", "?"))
            assert len(starts) == 3 + text.count("More")
        keys = documents.hash_D[plan.places].view(np.uint64)[::2]
        assert np.array_equal(shard.keys_D, keys)
        assert len(set(shard.ids.to_pylist())) == entry.documents
    assert len(found) == len(set(found)) == 40
    upto = records[0]["lengths"]
    assert all(int(key) & (int(key) - 1) == 0 for key in upto), "powers of two"


def test_large_files_of_lines_are_not_scanned_for_every_shard(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "MOST_SCANS", 2)
    files, documents = prepared(source)
    plans = plan_shards(documents, 400)
    tasks = [task.to_pylist() for task in make_tasks(plans, documents, files)]
    assert [part["shard"] for task in tasks for part in task] == [
        plan.name for plan in plans for _ in np.unique(documents.file_D[plan.places])
    ]
    scans = [sum("b.jsonl" in part["file"] for part in task) > 0 for task in tasks]
    of_lines = sum("b.jsonl" in part["file"] for task in tasks for part in task)
    assert of_lines > 10
    # Two for its text, one that begins in the file before it, one for what is held out.
    assert sum(scans) <= 4


def test_a_file_that_changes_is_noticed(source: Path) -> None:
    files, documents = prepared(source)
    [task] = make_tasks(plan_shards(documents, 1 << 30)[:1], documents, files)
    lines = (source / "b.jsonl").read_text().splitlines()
    (source / "b.jsonl").write_text("\n".join([*lines[:5], lines[5].replace("begins", "ended"), *lines[6:]]))
    with pytest.raises(InputError, match=r"b\.jsonl changed while it was being prepared"):
        list(read_parts(task.to_pylist(), COLUMNS))


def test_a_large_vocabulary_takes_wider_integers(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_tokenizer_folder, str(tmp_path))
    table = pa.table({"document_id": ["a"], "text": ["One. Two."], "text_hash": pa.array([b"0" * 16], pa.binary(16))})
    tokenizer = corpus_tokenizer(str(tmp_path))
    for size, kind in ((65_536, pa.uint16()), (65_537, pa.int32())):
        assert tokenize(table, tokenizer, size).schema.field("tokens").type == pa.list_(kind)
