"""What following a job gives: its log on stderr, its report and exit status as if it had run here."""

import json
import sys
from types import SimpleNamespace

import pytest

from cluster.submission import Unknown
from jobs import follow as following
from jobs.follow import Display, Ended, Listed, describe, follow, mark
from jobs.report import EmbedReport
from model.errors import InputError


@pytest.fixture
def report() -> EmbedReport:
    counts = dict.fromkeys(("read", "embedded", "unchanged", "empty", "duplicate", "dead", "deleted"), 0)
    sums = {"chunks": 0, "tokens": 0, "truncated_tokens": 0, "padding": 0.0, "seconds": 1.0, "tokens_per_s": 0.0}
    return EmbedReport("embed", "unpublished", "s3://t", 3, "f", **counts, **sums)


def ended(log: str, status: str, code: int | None, message: str = "") -> SimpleNamespace:
    """A client that knows one job, which has ended so."""

    async def tail(job: str):
        yield log

    class Status(str):
        def is_terminal(self) -> bool:
            return True

    info = SimpleNamespace(status=Status(status), driver_exit_code=code, message=message)
    return SimpleNamespace(tail_job_logs=tail, get_job_info=lambda job: info, get_job_logs=lambda job: log)


def test_the_report_comes_out_of_the_log(report, capsys):
    client = ended(f"one\n{mark(report)}\ntwo", "FAILED", 3)
    followed = follow(client, "job")
    assert followed.status == "unpublished"  # which the command line turns into exit status 3, as it would here
    assert json.loads(followed.to_json()) == json.loads(report.to_json())
    assert followed.summary() == report.summary()
    assert follow(client, "job", as_json=True).summary() == report.to_json()
    assert capsys.readouterr().err == "one\ntwo\n" * 2


@pytest.mark.parametrize(
    ("status", "code", "message", "says", "exit_status"),
    [
        ("FAILED", 2, "", "job ended with status 2; the reason stands above", 2),
        ("FAILED", -9, "", "ended with status 137", 137),
        ("FAILED", None, "runtime_env could not be set up\nmore", "job failed: runtime_env could not be set up", 1),
        ("STOPPED", None, "", "job was stopped", 130),
    ],
)
def test_a_job_without_a_report_gives_its_status(status, code, message, says, exit_status):
    with pytest.raises(Ended, match=says) as end:
        follow(ended("a line\n", status, code, message), "job")
    assert end.value.status == exit_status


def test_a_job_that_is_not_there():
    def nothing(job: str) -> None:
        raise Unknown("there is no job")

    with pytest.raises(InputError, match="there is no job"):
        follow(SimpleNamespace(tail_job_logs=ended("", "", 0).tail_job_logs, get_job_info=nothing), "job")


def test_whoever_looks_away_does_not_end_the_job(monkeypatch):
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.Follower, "follow", interrupt)
    with pytest.raises(Ended, match="nightloom attach job") as end:
        follow(ended("", "RUNNING", None), "job")
    assert end.value.status == 130


def test_lines_are_whole_however_they_arrive(report, capsys):
    display = Display()
    for character in f"one\n{mark(report)}\n\ntwo":
        display.show(character)
    display.close()
    assert capsys.readouterr().err == "one\n\ntwo\n"
    assert display.report["status"] == "unpublished"


def test_jobs_are_listed_for_people_and_as_json():
    info = SimpleNamespace(
        submission_id="embed-t-1",
        status="SUCCEEDED",
        start_time=1_700_000_000_000,
        end_time=1_700_000_090_000,
        entrypoint="exec python -m jobs.cli embed a b",
    )
    one = describe(info)
    assert one["command"] == "nightloom embed a b"
    listed = Listed("jobs", "done", [one])
    assert listed.summary().split()[:2] == ["embed-t-1", "succeeded"]
    assert listed.summary().endswith("1 min 30 s")
    assert json.loads(listed.to_json())["jobs"] == [one]
    assert Listed("jobs", "done").summary() == "No jobs were submitted to this cluster."
    assert "attach embed-t-1" in Listed("submit", "submitted", [one]).summary()


def test_following_needs_no_ray_until_it_connects():
    assert "ray" not in following.__dict__
    assert "jobs.submit" not in sys.modules or "ray" in sys.modules
