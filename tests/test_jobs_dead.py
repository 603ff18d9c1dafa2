"""`nightloom dead`: all letters for programs, the first of them for people; and what nights do to letters."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from test_jobs_embed import configured, vectors
from test_pipeline_table import RECIPE

from jobs import embed
from jobs.dead import MOST_SHOWN, run_dead
from jobs.embed import run_embed
from jobs.plan import run_plan
from model.errors import InputError
from pipeline.dead import Dead, DeadLetters
from pipeline.table import EmbeddingTable
from pipeline.workers import Job, encoder_of


@pytest.fixture
def table(tmp_path):
    return EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")


def test_nothing_is_dead(table):
    report = run_dead(table.uri)
    assert (report.stages, report.dead) == ({}, [])
    assert report.summary().startswith("Every document that was read stands in")


def test_letters_are_listed(table):
    letters = [
        Dead.named("b", "z.jsonl", "quarantine", "killed its worker 2 times", text_hash=b"\x01" * 16, attempts=2),
        Dead.named("a.jsonl#3", "a.jsonl", "read", "line 4 is not JSON"),
        Dead.named("[bold]", "z.jsonl", "embed", "x" * 500, text_hash=b"\x02" * 16),
    ]
    DeadLetters(table).record(letters, "r1")
    report = run_dead(table.uri)
    assert report.stages == {"embed": 1, "quarantine": 1, "read": 1}
    assert [row["document_id"] for row in report.dead] == ["a.jsonl#3", "[bold]", "b"]
    assert report.dead[2]["text_hash"] == "01" * 16
    assert json.loads(report.to_json())["dead"] == report.dead
    summary = report.summary()
    assert summary.startswith("3 documents could not be embedded")
    assert "[bold]" in summary
    assert "--retry-dead" in summary


def test_many_letters_are_shown_in_part(table):
    letters = [
        Dead.named(f"d{i:04}", "a.jsonl", "embed", "why", text_hash=b"\x01" * 16) for i in range(MOST_SHOWN + 50)
    ]
    DeadLetters(table).record(letters, "r1")
    report = run_dead(table.uri)
    assert len(report.dead) == MOST_SHOWN + 50
    assert "and 50 more" in report.summary()
    assert f"d{MOST_SHOWN:04}" not in report.summary()


def test_no_table(tmp_path):
    with pytest.raises(InputError, match="there is no table"):
        run_dead(str(tmp_path / "none.lance"))


class FailsOnBad:
    """The real encoder; documents whose id begins with "bad" fail in it while a file named "broken" is there."""

    def __init__(self, job: Job) -> None:
        self.stage, self.broken = encoder_of(job), os.path.join(os.path.dirname(job.uri), "broken")

    def embed(self, tokens: pa.Table) -> Iterator[Any]:
        bad = pc.starts_with(tokens["document_id"], "bad")
        bad = pc.and_(bad, pa.scalar(os.path.exists(self.broken)))
        for part in self.stage.embed(tokens.filter(pc.invert(bad))):
            dead = tokens.filter(bad).select(["document_id", "text_hash", "source"])
            for name, value in (("stage", "embed"), ("error", "ValueError: it is bad")):
                dead = dead.append_column(name, pa.array([value] * len(dead), pa.string()))
            yield SimpleNamespace(rows=part.rows, dead=dead, statistics=part.statistics)


def write(path: Path, **texts: str) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))


def attempts(table: Path) -> dict[str, tuple[str, int]]:
    return {row["document_id"]: (row["stage"], row["attempts"]) for row in run_dead(str(table)).dead}


@pytest.mark.slow
def test_nights_of_documents_that_fail(tmp_path, tiny_model_folder, ray_session, monkeypatch):
    from ray import cloudpickle

    module = sys.modules[__name__]  # workers cannot import this file
    cloudpickle.register_pickle_by_value(module)
    monkeypatch.setattr(embed, "Job", lambda **given: replace(Job(**given), encoder=FailsOnBad))
    source, table, broken = tmp_path / "a.jsonl", tmp_path / "table.lance", tmp_path / "broken"
    broken.touch()

    def night(**given: Any) -> tuple[int, int, int, int]:
        report = run_embed(configured(source, table, tiny_model_folder, **given))
        return report.embedded, report.unchanged, report.dead, report.duplicate

    try:
        texts = {"good": "a text", "bad1": "one", "bad2": "two"}
        write(source, **texts)
        source.write_text(source.read_text() + '{"id": "bad1", "text": "another text of this name"}\nno JSON\n')
        assert night() == (1, 0, 3, 1)
        assert attempts(table) == {"bad1": ("embed", 1), "bad2": ("embed", 1), "a.jsonl#4": ("read", 1)}
        # They are left alone, the second text of the name too; and `plan` knows.
        assert night() == (0, 1, 3, 1)
        assert attempts(table)["bad1"] == ("embed", 1)
        assert run_plan(configured(source, table, tiny_model_folder)).dead == 3
        # Tried again when asked, and when the text is another one.
        assert night(retry_dead=True) == (0, 1, 3, 1)
        assert attempts(table) == {"bad1": ("embed", 2), "bad2": ("embed", 2), "a.jsonl#4": ("read", 1)}
        write(source, **texts | {"bad1": "one, but longer"})
        assert night() == (0, 1, 2, 0)
        assert attempts(table) == {"bad1": ("embed", 1), "bad2": ("embed", 2)}
        # Mended, gone, empty: nothing is left.
        broken.unlink()
        write(source, **texts | {"bad1": "one, and mended", "bad2": " "})
        assert night() == (1, 1, 0, 0)
        assert attempts(table) == {}
        assert sorted({name for name, _ in vectors(table)}) == ["bad1", "good"]
        broken.touch()
        write(source, **texts | {"bad3": "three"})
        assert night() == (0, 1, 3, 0)
        write(source, good="a text")
        assert night() == (0, 1, 0, 0)
        assert attempts(table) == {}
        assert sorted({name for name, _ in vectors(table)}) == ["bad1", "good"]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
