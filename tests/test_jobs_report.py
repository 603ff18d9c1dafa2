"""Reports add up or refuse to exist; summaries say what matters."""

import json
from dataclasses import replace

import pytest

from jobs.report import REPORT_KEYS, EmbedReport, Progress, clock

REPORT = EmbedReport(
    job="embed",
    status="published",
    table="t",
    version=3,
    fingerprint="f" * 32,
    read=10,
    embedded=5,
    unchanged=2,
    empty=1,
    duplicate=1,
    dead=1,
    deleted=4,
    chunks=7,
    tokens=12345,
    truncated_tokens=0,
    padding=0.0,
    seconds=2.5,
    tokens_per_s=4938.0,
    reused=2,
    published=3,
)


def test_report_is_one_json_line_with_the_agreed_keys():
    assert "\n" not in REPORT.to_json()
    assert list(json.loads(REPORT.to_json())) == list(REPORT_KEYS)
    assert ", ".join(REPORT_KEYS) == (
        "job, status, table, version, fingerprint, read, embedded, unchanged, empty, duplicate, dead, deleted, chunks, "
        "tokens, truncated_tokens, padding, seconds, tokens_per_s, left, reused, published, wasted_tokens"
    )


@pytest.mark.parametrize("name", ["read", "embedded", "unchanged", "empty", "duplicate", "dead"])
def test_every_document_must_be_accounted_for(name):
    with pytest.raises(RuntimeError, match="accounted for"):
        replace(REPORT, **{name: getattr(REPORT, name) + 1})


def test_summary_leads_with_the_outcome():
    assert REPORT.summary().splitlines()[0] == "5 documents embedded into t, published as version 3."
    assert "12,345" in REPORT.summary()
    assert "7, 2 of them as they were" in REPORT.summary()
    assert "truncated" not in REPORT.summary()
    quiet = replace(REPORT, status="unchanged", read=2, embedded=0, empty=0, duplicate=0, dead=0, deleted=0)
    assert quiet.summary().startswith("Nothing to embed: all 2 documents stand in t as they are.")


@pytest.mark.parametrize(
    "seconds, text", [(0.04, "0.0 s"), (7.31, "7.3 s"), (754, "12 min 34 s"), (3600 * 5 + 61, "5 h 1 min")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_progress_lines_where_there_is_no_terminal(capsys):
    progress = Progress(total_documents=4, total_chars=100)
    progress.last_line -= progress.EVERY_S
    with progress:
        progress.advance(2, 1000, 50)
        progress.advance(1, 500, 25)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("nightloom: 2 of 4 documents, ")
    assert " left" in err


def test_what_was_wasted_is_said_where_anything_was():
    assert "wasted" not in REPORT.summary()
    assert "wasted     1,234 tokens, 9.1%" in replace(REPORT, wasted_tokens=1_234).summary()
