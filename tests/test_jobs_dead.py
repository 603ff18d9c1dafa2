"""`nightloom dead`: all letters for programs, the first of them for people."""

import json

import pytest
from test_pipeline_table import RECIPE

from jobs.dead import MOST_SHOWN, run_dead
from model.errors import InputError
from pipeline.dead import Dead, DeadLetters
from pipeline.table import EmbeddingTable


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
