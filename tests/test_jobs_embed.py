"""`embed` end to end on a real Ray: first, second and changed nights; duplicates; a run killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.configuration import EmbedConfiguration, load
from jobs.embed import run_embed
from jobs.history import run_rollback, run_versions
from jobs.migrate import run_migrate
from jobs.search import run_search
from model.errors import InputError
from pipeline.lease import holder
from pipeline.ledger import past_pace, read_records
from pipeline.table import PUBLISHED, EmbeddingTable
from pipeline.vectors import also_array

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the quick brown fox jumps over a lazy dog while vectors are embedded every night in long documents"
WORDS = SENTENCE.split()


def text_of(number: int, words: int) -> str:
    draw = np.random.default_rng(number)
    return f"Document {number}. " + " ".join(draw.choice(WORDS, words)) + "."


def write_corpus(folder: Path, count: int, words: int = 30) -> None:
    """Text files and a Parquet file, half each."""
    folder.mkdir(exist_ok=True)
    half = count // 2
    for number in range(half):
        (folder / f"{number:03}.txt").write_text(text_of(number, words))
    numbers = range(half, count)
    table = {"id": [f"row-{n}" for n in numbers], "text": [text_of(n, words) for n in numbers], "n": list(numbers)}
    pq.write_table(pa.table(table), folder / "more.parquet")


def configured(source: Path, table: Path, model: Path, *sets: str, **given) -> EmbedConfiguration:
    names = {"source": str(source), "table": str(table), "model": str(model)}
    return load(EmbedConfiguration, file=None, sets=["vectors.dtype=float32", *sets], given=names | given)


def vectors(table: Path, version: str | None = PUBLISHED) -> dict[tuple[str, int], np.ndarray]:
    """{(document, chunk): vector}; a row that is there twice fails."""
    rows = lance.dataset(str(table), version=version).to_table(columns=["document_id", "chunk", "vector"]).to_pylist()
    found = {(row["document_id"], row["chunk"]): np.array(row["vector"]) for row in rows}
    assert len(found) == len(rows)
    return found


def assert_same(left: dict, right: dict) -> None:
    assert sorted(left) == sorted(right)
    for key, vector in left.items():
        np.testing.assert_allclose(vector, right[key], atol=2e-5, err_msg=str(key))


@pytest.mark.usefixtures("ray_session")
def test_nights(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write_corpus(source, 40)
    (source / "empty.md").write_text(" \n\t")
    (source / "again.jsonl").write_text('{"id": "001.txt", "text": "a second document of this name"}\nno JSON\n')
    configuration = configured(source, table, tiny_model_folder, "compute.block_chars=1000")

    first = run_embed(configuration)
    assert (first.status, first.read, first.embedded, first.empty) == ("published", 43, 40, 1)
    assert (first.duplicate, first.dead) == (1, 1)
    assert first.tokens > 40 * 30
    assert first.padding == 0
    before = vectors(table)
    assert len(before) == first.chunks == 40
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in before.values())

    second = run_embed(configuration)
    assert (second.status, second.version, second.embedded, second.unchanged) == ("unchanged", first.version, 0, 40)
    assert second.tokens == 0

    (source / "003.txt").write_text("changed")
    (source / "004.txt").write_text("")
    (source / "005.txt").unlink()
    (source / "new.txt").write_text("new")
    third = run_embed(configuration)
    assert (third.embedded, third.unchanged, third.empty, third.deleted) == (2, 37, 2, 1)
    after = vectors(table)
    assert sorted({name for name, _ in set(before) ^ set(after)}) == ["004.txt", "new.txt"]
    changed = {key for key in set(before) & set(after) if not np.array_equal(before[key], after[key])}
    assert {name for name, _ in changed} == {"003.txt"}

    fourth = run_embed(configured(source, table, tiny_model_folder, delete_missing=True))
    assert (fourth.status, fourth.embedded, fourth.deleted) == ("published", 0, 1)
    assert "005.txt" not in {name for name, _ in vectors(table)}

    records = read_records(str(table))
    assert [record["status"] for record in records] == ["published", "unchanged", "published", "published"]
    assert records[0]["configuration"]["compute"]["block_chars"] == 1000
    assert records[0]["report"]["embedded"] == 40
    assert [(row["source"], row["stage"]) for row in records[0]["dead"]] == [(str(source / "again.jsonl"), "read")]
    runs = set(lance.dataset(str(table)).to_table(columns=["run"])["run"].to_pylist())
    assert runs == {records[0]["run"], records[2]["run"]}


@pytest.mark.usefixtures("ray_session")
def test_chunks_that_stay_keep_their_vectors(tmp_path, tiny_model_folder):
    source, table, fresh = tmp_path / "corpus", tmp_path / "table.lance", tmp_path / "fresh.lance"
    write_corpus(source, 6)
    paragraphs = [text_of(100 + number, 24) + "\n\n" for number in range(20)]
    (source / "long.txt").write_text("".join(paragraphs))
    chunked = ("chunking.granularity=both", 'chunking.context="none"', "chunking.chunk_tokens=110")
    first = run_embed(configured(source, table, tiny_model_folder, *chunked))
    assert first.reused == 0
    paragraphs[9] = paragraphs[9].replace("Document", "Another document")
    (source / "long.txt").write_text("".join(paragraphs))
    second = run_embed(configured(source, table, tiny_model_folder, *chunked))
    assert (second.status, second.embedded, second.unchanged) == ("published", 1, 6)
    assert second.reused >= 8
    assert second.chunks - second.reused <= 4  # that of the document, and of chunks until the cuts are in step again
    assert f"{second.reused} of them as they were" in second.summary()
    assert read_records(str(table))[-1]["report"]["reused"] == second.reused
    run_embed(configured(source, fresh, tiny_model_folder, *chunked))
    assert_same(vectors(table), vectors(fresh))
    names = ["document_id", "chunk", "char_start", "char_end", "token_start", "token_end", "text_hash", "chunk_hash"]
    left, right = (
        lance.dataset(str(uri)).to_table(columns=names).sort_by([("document_id", "ascending"), ("chunk", "ascending")])
        for uri in (table, fresh)
    )
    assert left.equals(right)

    paragraphs[3] = paragraphs[3].replace("Document", "Another document")
    (source / "long.txt").write_text("".join(paragraphs))
    other = run_migrate(configured(source, table, tiny_model_folder, *chunked, "chunking.overlap_tokens=1"))
    assert (other.status, other.embedded, other.reused) == ("published", 7, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_night_after_a_rollback(tmp_path, tiny_model_folder, caplog):
    source, table = tmp_path / "corpus", str(tmp_path / "table.lance")
    write_corpus(source, 6)
    configuration = configured(source, table, tiny_model_folder, keep_versions=2)
    first = run_embed(configuration)
    (source / "wrong.txt").write_text("what nobody should see")
    second = run_embed(configuration)
    assert run_rollback(table).published == first.version
    third = run_embed(configuration)
    assert (third.status, third.embedded, third.version) == ("unchanged", 0, second.version)
    assert "readers stay at version" in caplog.text
    assert len(vectors(table)) == 6
    (source / "wrong.txt").write_text("corrected")
    fourth = run_embed(configuration)
    assert (fourth.status, fourth.embedded, fourth.unchanged) == ("published", 1, 6)
    assert len(vectors(table)) == 7
    assert [v.status for v in run_versions(table).versions] == ["kept", "published"]
    assert [record["status"] for record in read_records(table)] == [
        "published",
        "published",
        "rolled back",
        "unchanged",
        "published",
    ]
    assert lance.dataset(table).version == EmbeddingTable.open(table, PUBLISHED).version


@pytest.mark.usefixtures("ray_session")
def test_small_fragments_are_merged_before_readers_see_them(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", str(tmp_path / "table.lance")
    write_corpus(source, 20)
    report = run_embed(
        configured(source, table, tiny_model_folder, "compute.block_chars=200", "compute.commit_every_s=0")
    )
    published = EmbeddingTable.open(table, PUBLISHED)
    assert published.version == report.version
    assert len(published.dataset.get_fragments()) == 1
    assert len(vectors(table)) == 20
    assert len(published.dataset.versions()) == 1
    assert len(list((tmp_path / "table.lance" / "data").iterdir())) == 1
    (record,) = read_records(table)
    assert (record["rows"], record["documents"], record["commits"] > 8) == (20, 20, True)
    start, speed = past_pace(read_records(table))
    assert 0 <= start < start + report.tokens / speed == pytest.approx(record["embedding_s"])


@pytest.mark.usefixtures("ray_session")
def test_chunks_carried_columns_and_long_documents(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    source.mkdir()
    texts = [text_of(1, 5), text_of(2, 900)]
    pq.write_table(pa.table({"body": texts, "key": ["short", "long"], "year": [1, 2]}), source / "a.parquet")
    sets = ["columns.text=body", "columns.id=key", "columns.carry=year", "chunking.granularity=both"]
    configuration = configured(source, table, tiny_model_folder, *sets, "chunking.chunk_tokens=64")
    report = run_embed(configuration)
    rows = lance.dataset(str(table)).to_table().to_pylist()
    assert (report.embedded, report.chunks, report.truncated_tokens) == (2, len(rows), 0)
    assert {(row["document_id"], row["year"]) for row in rows} == {("short", 1), ("long", 2)}
    whole = {row["document_id"]: row for row in rows if row["chunk"] == -1}
    assert (whole["long"]["char_start"], whole["long"]["char_end"]) == (0, len(texts[1]))
    assert sum(row["document_id"] == "long" for row in rows) > 10
    with pytest.raises(InputError, match=r"carries the columns year, .* asks for none"):
        run_embed(configured(source, table, tiny_model_folder, *sets[:2], sets[3], "chunking.chunk_tokens=64"))
    with pytest.raises(InputError, match=r"another recipe \(chunk_tokens: 64 -> 32\)"):
        run_embed(configured(source, table, tiny_model_folder, *sets, "chunking.chunk_tokens=32"))


@pytest.mark.usefixtures("ray_session")
def test_two_actors_give_the_same_table(tmp_path, tiny_model_folder):
    write_corpus(tmp_path / "corpus", 20)
    for actors in (1, 2):
        table = tmp_path / f"{actors}.lance"
        run_embed(
            configured(
                tmp_path / "corpus", table, tiny_model_folder, f"compute.actors={actors}", "compute.block_chars=500"
            )
        )
    assert_same(vectors(tmp_path / "1.lance"), vectors(tmp_path / "2.lance"))
    with pytest.raises(InputError, match="actors is 3, this session has room for 2"):
        run_embed(configured(tmp_path / "corpus", tmp_path / "3.lance", tiny_model_folder, "compute.actors=3"))


@pytest.mark.usefixtures("ray_session")
def test_corpus_without_a_document_to_embed(tmp_path, tiny_model_folder):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("  ")
    report = run_embed(configured(tmp_path / "corpus", tmp_path / "table.lance", tiny_model_folder))
    assert (report.read, report.empty, report.embedded, report.status) == (1, 1, 0, "published")


@pytest.mark.usefixtures("ray_session")
def test_killed_run_is_taken_up(tmp_path, tiny_model_folder):
    """SIGKILL to the driver between commits: the next run does the rest, and the table is as if nothing had been."""
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write_corpus(source, 30, words=400)
    sets = ["compute.block_chars=2000", "compute.commit_every_s=0"]
    command = [sys.executable, "-m", "jobs.cli", "embed", str(source), str(table), "--model", str(tiny_model_folder)]
    for item in ("vectors.dtype=float32", *sets):
        command += ["--set", item]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while holder(str(table)) is None and killed.poll() is None:
        time.sleep(0.05)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"another run is writing to {table}: run " in second.stderr
    assert second.stderr.count("\n") == 1
    assert len(read_records(str(table))) == 1
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        found = EmbeddingTable.find(str(table))
        if found is not None and found.version >= 4:
            break
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    killed.stderr.close()
    half = vectors(table, version=None)
    assert 0 < len(half) < 30
    assert EmbeddingTable.open(str(table)).published_version() is None
    assert [record["status"] for record in read_records(str(table))] == ["crashed"]

    report = run_embed(configured(source, table, tiny_model_folder))
    assert report.unchanged >= len(half)
    assert (report.read, report.embedded + report.unchanged) == (30, 30)
    run_embed(configured(source, tmp_path / "undisturbed.lance", tiny_model_folder))
    assert_same(vectors(table), vectors(tmp_path / "undisturbed.lance"))


def test_cheaper_forms_stand_beside_the_vectors(tmp_path, tiny_model_folder):
    """Of encoded chunks, of those that were taken over, and after a migration; in every night."""
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    source.mkdir()
    text = " ".join(f"{text_of(n, 20)}" for n in range(6))
    (source / "a.txt").write_text(text)
    (source / "b.txt").write_text(text_of(9, 12))
    chunks = ("chunking.granularity=chunk", "chunking.context=none", "chunking.chunk_tokens=40")

    def check(types: tuple[str, ...]) -> int:
        rows = lance.dataset(str(table), version=PUBLISHED).to_table()
        assert [n for n in rows.column_names if n.startswith("vector")] == [*(f"vector_{t}" for t in types), "vector"]
        for name in types:
            expected = also_array(rows["vector"].combine_chunks(), "float16", name)
            assert rows[f"vector_{name}"].combine_chunks().equals(expected)
        return len(rows)

    settings = (*chunks, "vectors.normalize=true", "vectors.type=float16")
    run_embed(configured(source, table, tiny_model_folder, *settings))
    before = check(())
    with pytest.raises(InputError, match="also: none -> bits"):
        run_embed(configured(source, table, tiny_model_folder, *settings, "vectors.also=bits"))
    both = configured(source, table, tiny_model_folder, *settings, 'vectors.also=["bits", "int8"]')
    assert run_migrate(both).status == "published"
    assert check(("int8", "bits")) == before
    (source / "a.txt").write_text(text + " And a new end of it.")
    assert run_embed(both).reused > 0
    assert check(("int8", "bits")) >= before
    hit = run_search(str(table), text_of(9, 12), model=str(tiny_model_folder)).hits[0]
    assert hit.document_id == "b.txt"
    assert hit.score > 0.9
