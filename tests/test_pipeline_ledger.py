"""The ledger: every end of a run is told apart, a killed run is crashed for the next reader, secrets stay out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import InputError
from pipeline import ledger
from pipeline.lease import Lease
from pipeline.ledger import keep_record, new_run, note, past_pace, read_records, recorded, rolled_back

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path, monkeypatch) -> str:
    if request.param == "local":
        return str(tmp_path / "table.lance")
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/table.lance"


def statuses(uri: str) -> list[str]:
    return [record["status"] for record in read_records(uri)]


def test_a_record_is_there_from_the_beginning_and_says_how_a_run_ended(uri):
    assert read_records(uri) == []
    first = new_run()
    with Lease.take(uri, first), recorded(uri, first, "embed", configuration={"source": "here"}) as entry:
        assert statuses(uri) == ["running"]
        entry.set(version_before=4)
        entry.set(status="published", version=7)
    (record,) = read_records(uri)
    assert record["run"] == first
    assert record["configuration"] == {"source": "here"}
    assert (record["job"], record["status"], record["version_before"], record["version"]) == (
        "embed",
        "published",
        4,
        7,
    )
    assert record["started"] <= record["ended"]
    assert 0 <= record["seconds"] < 60
    assert (record["host"], record["pid"]) == (os.uname().nodename, os.getpid())

    second, third = new_run(), new_run()
    assert first < second < third
    with pytest.raises(InputError), recorded(uri, second, "embed"):
        raise InputError("a table of another kind")
    with pytest.raises(KeyboardInterrupt), recorded(uri, third, "embed"):
        raise KeyboardInterrupt
    assert statuses(uri) == ["published", "failed", "interrupted"]
    assert [record["run"] for record in read_records(uri, last=2)] == [second, third]
    assert read_records(uri, last=0) == []
    assert read_records(uri)[1]["error"] == "a table of another kind"


def test_secrets_stay_out_of_records(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "marked-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret")
    uri = str(tmp_path / "table.lance")
    with pytest.raises(OSError), recorded(uri, new_run(), "embed"):
        raise OSError("signed with marked-secret for marked-key")
    assert read_records(uri)[0]["error"] == "signed with *** for ***"


def test_a_killed_run_has_crashed_for_the_next_reader(tmp_path):
    uri = str(tmp_path / "table.lance")
    code = (
        "import os, sys; from pipeline.ledger import *; from pipeline.lease import Lease\n"
        "uri, run = sys.argv[1], new_run()\n"
        "with Lease.take(uri, run), recorded(uri, run, 'embed'):\n"
        "    print(read_records(uri)[0]['status'], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, uri], cwd=ROOT, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-9, "running\n")
    assert statuses(uri) == ["crashed"]
    run = new_run()
    with Lease.take(uri, run), recorded(uri, run, "embed") as entry:
        assert statuses(uri) == ["crashed", "running"]
        entry.set(status="unchanged")
    assert statuses(uri) == ["crashed", "unchanged"]


def test_a_run_that_ends_while_its_record_is_read_has_not_crashed(tmp_path, monkeypatch):
    uri, run = str(tmp_path / "table.lance"), new_run()
    keep_record(uri, run, {"status": "running"})

    def ended(_: str) -> None:
        keep_record(uri, run, {"status": "published"})

    monkeypatch.setattr(ledger, "holder", ended)
    assert statuses(uri) == ["published"]


def test_past_pace_goes_by_runs_that_embedded(tmp_path):
    uri = str(tmp_path / "table.lance")
    assert past_pace(read_records(uri)) is None
    keep_record(uri, new_run(), {"status": "published", "tokens": 9, "embedding_s": 1.0})
    for _ in range(2 * ledger.RUNS_OF_PACE):
        keep_record(uri, new_run(), {"status": "unchanged", "tokens": 0, "embedding_s": 0.0})
    assert past_pace(read_records(uri)) == (0.0, 9.0)
    keep_record(uri, new_run(), {"status": "published", "tokens": 1000, "embedding_s": 8.0})
    keep_record(uri, new_run(), {"status": "running"})
    assert past_pace(read_records(uri)) == (0.0, 1009 / 9)
    for _ in range(ledger.RUNS_OF_PACE):
        keep_record(uri, new_run(), {"status": "published", "tokens": 10, "embedding_s": 1.0})
    assert past_pace(read_records(uri)) == (0.0, 10.0)


def test_small_nights_do_not_make_a_large_one_look_slow(tmp_path):
    """Ten seconds to start, 100 tokens a second on each of two actors: whatever the nights before embedded."""
    uri = str(tmp_path / "table.lance")
    for tokens in (200, 600, 200):
        facts = {"tokens": tokens, "embedding_s": 10 + tokens / 200, "encoder_s": tokens / 100, "actors": 2}
        keep_record(uri, new_run(), {"status": "published", **facts})
    start, speed = past_pace(read_records(uri))
    assert start == pytest.approx(10)
    assert speed == pytest.approx(200)


def test_rolled_back_until_a_run_publishes_or_changes_the_table(tmp_path):
    uri = str(tmp_path / "table.lance")
    assert not rolled_back(uri, newest=9, published=7)
    keep_record(uri, new_run(), {"status": "published", "version": 9, "published_before": 7, "published": 9})
    assert not rolled_back(uri, newest=9, published=9)
    keep_record(uri, new_run(), {"status": "rolled back", "version": 9, "published_before": 9, "published": 7})
    keep_record(uri, new_run(), {"status": "unchanged", "version": 9, "published_before": 7, "published": 7})
    keep_record(uri, new_run(), {"status": "failed"})
    assert rolled_back(uri, newest=9, published=7)
    assert not rolled_back(uri, newest=10, published=7)
    keep_record(uri, new_run(), {"status": "partial", "version": 10, "published_before": 7, "published": 10})
    assert not rolled_back(uri, newest=9, published=7)
    assert json.loads(json.dumps(read_records(uri))) == read_records(uri)


def test_a_note_of_a_start_that_came_to_nothing_never_replaces_a_record(tmp_path):
    uri = str(tmp_path / "table")
    with recorded(uri, "r1", "embed") as entry:
        entry.set(status="published")
    note(uri, "r1", "nightly", "busy", error="another")
    note(uri, "r2", "nightly", "busy", error="another")
    assert [(r["run"], r["job"], r["status"], r.get("error")) for r in read_records(uri)] == [
        ("r1", "embed", "published", None),
        ("r2", "nightly", "busy", "another"),
    ]
