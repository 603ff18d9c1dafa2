"""Nights that read and embed no more than they must: unchanged files, budgets, deadlines."""

import json
import shutil
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_jobs_embed import assert_same, configured, text_of, vectors

import jobs.embed
from jobs.embed import limit_of, run_embed
from model.errors import InputError
from pipeline import apply, sources
from pipeline.storage import list_sources
from pipeline.table import EmbeddingTable
from pipeline.work import Limit


def write_lines(path, count: int, words: int = 12, changed: int | None = None) -> None:
    texts = [text_of(n if n != changed else 10**6, words) for n in range(count)]
    path.write_text("".join(json.dumps({"id": f"{path.stem}-{n}", "text": t}) + "\n" for n, t in enumerate(texts)))


@pytest.mark.usefixtures("ray_session")
def test_unchanged_files_are_not_read(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(sources, "RACY_NS", 0)  # a corpus that was written a moment ago
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    source.mkdir()
    write_lines(source / "a.jsonl", 40)
    write_lines(source / "b.jsonl", 30)
    numbers = range(50)
    rows = pa.table({"id": [f"c-{n}" for n in numbers], "text": [text_of(900 + n, 12) for n in numbers]})
    pq.write_table(rows, source / "c.parquet", row_group_size=20)
    configuration = configured(source, table, tiny_model_folder)
    first = run_embed(configuration)
    assert (first.status, first.embedded) == ("published", 120)

    # The same listing, and no files: whoever opens one fails.
    listing = list_sources(str(source))
    shutil.rmtree(source)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.embed, "list_corpus", lambda configuration: listing)
        second = run_embed(configuration)
    assert (second.status, second.read, second.unchanged, second.tokens) == ("unchanged", 120, 120, 0)

    # One document of one file changes: the other files need not be there.
    source.mkdir()
    write_lines(source / "b.jsonl", 30, changed=17)
    now = {file.path: file for file in list_sources(str(source))}
    with monkeypatch.context() as patch:
        patch.setattr(jobs.embed, "list_corpus", lambda configuration: [now.get(f.path, f) for f in listing])
        third = run_embed(configuration)
    assert (third.status, third.read, third.embedded, third.unchanged) == ("published", 120, 1, 119)


@pytest.mark.usefixtures("ray_session")
def test_a_budget_is_used_on_what_changed_first(tmp_path, tiny_model_folder, monkeypatch):
    # One reader and one actor at a time: of what several have begun, any may end first and use the budget up.
    monkeypatch.setattr(apply, "CPUS_OF_READER", 2)
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    source.mkdir()
    write_lines(source / "z.jsonl", 30)
    sets = ["compute.block_chars=600", "compute.commit_every_s=0", "compute.actors=1"]
    configuration = configured(source, table, tiny_model_folder, *sets)
    start = run_embed(configured(source, table, tiny_model_folder, *sets, budget_tokens=200))
    # Readers see a first version when it is whole.
    assert (start.status, start.published) == ("partial", None)
    assert 0 < start.embedded < 30
    assert start.read == 30 == start.embedded + start.left
    assert "left for the next run" not in start.summary()
    assert EmbeddingTable.open(str(table)).published_version() is None
    rest = run_embed(configuration)
    assert (rest.status, rest.embedded, rest.unchanged, rest.left) == ("published", start.left, start.embedded, 0)
    before = vectors(table)

    write_lines(source / "a.jsonl", 60)
    write_lines(source / "z.jsonl", 30, changed=29)
    partial = run_embed(configured(source, table, tiny_model_folder, *sets, budget_tokens=1))
    assert partial.status == "partial"
    assert partial.published == partial.version == EmbeddingTable.open(str(table)).published_version()
    assert 1 <= partial.embedded < 61
    assert partial.embedded + partial.left == 61
    seen = vectors(table)
    assert len(seen) == 30 + partial.embedded - 1
    # The changed document, last in the listing, was the first to be done.
    assert not np.allclose(seen["z-29", -1], before["z-29", -1])
    run_embed(configuration)
    after = vectors(table)
    assert len(after) == 90
    assert_same({key: after[key] for key in seen}, seen)


def test_deadlines_are_the_next_of_their_time(tmp_path):
    def at(deadline: str | None, hour: int, **given):
        configuration = configured(tmp_path, tmp_path / "t", tmp_path, deadline=deadline, **given)
        limit = limit_of(configuration, datetime(2026, 3, 14, hour, 30))
        return None if limit.deadline is None else datetime.fromtimestamp(limit.deadline)

    assert at(None, 5) is None
    assert at("06:00", 5) == datetime(2026, 3, 14, 6, 0)
    assert at("06:00", 7) == datetime(2026, 3, 15, 6, 0)
    for wrong in ("6", "24:00", "soon"):
        with pytest.raises(InputError, match="no time of day"):
            at(wrong, 5)


@pytest.mark.usefixtures("ray_session")
def test_a_deadline_that_is_over_ends_the_run(tmp_path, tiny_model_folder, monkeypatch):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    source.mkdir()
    write_lines(source / "a.jsonl", 20)
    monkeypatch.setattr(jobs.embed, "limit_of", lambda configuration, begun: Limit(deadline=1.0))
    report = run_embed(configured(source, table, tiny_model_folder, "compute.block_chars=300"))
    assert report.status == "partial"
    assert report.left >= 19 - report.embedded
