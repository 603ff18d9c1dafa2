"""Jobs on a cluster from the outside: follow one to its end, list them, stop one.

A submitted job prints its report as one marked line of its log. Who follows takes it out of the log and returns it as
if the command had run here, with its exit status.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from cluster.submission import PATIENCE_S, Follower, Unknown, Unreachable, connect, find_job
from jobs.report import clock
from model.errors import InputError

MARK = "::nightloom-report "
"""Begins the line of a submitted job's log that is its report."""
REPORTING = "NIGHTLOOM_REPORTING"
"""The variable that tells a job that somebody wants that line."""
VERSIONS = "NIGHTLOOM_VERSIONS"
"""The variable that tells a job which packages the checkout was tested with."""


class Ended(Exception):
    """A job ended without a report: the exit status to end with, and a line about it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Followed:
    """The report that a job sent through its log."""

    status: str
    text: str
    """What the command prints for people."""
    report: dict[str, Any]
    as_json: bool = False
    """The job's own command had --json."""

    def summary(self) -> str:
        return self.to_json() if self.as_json else self.text

    def to_json(self) -> str:
        return json.dumps(self.report)


@dataclass(frozen=True, slots=True)
class Listed:
    """What `nightloom jobs`, `stop` and `submit --detach` say."""

    job: str
    status: str
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> str:
        if self.job != "jobs":
            (one,) = self.jobs
            return {
                "submitted": f"{one['id']} is submitted; nightloom attach {one['id']} follows it.",
                "stopping": f"{one['id']} is told to stop; what it committed stays.",
                "ended": f"{one['id']} had ended before ({one['status'].lower()}).",
            }[self.status]
        if not self.jobs:
            return "No jobs were submitted to this cluster."
        width = max(len(one["id"]) for one in self.jobs)
        return "\n".join(
            f"{one['id']:<{width}}  {one['status'].lower():<9}  {one['started'] or '-':<16}  {one['took'] or '-'}"
            for one in self.jobs
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def mark(report: Any) -> str:
    """The line of a submitted job's log that holds its report."""
    content = {"status": report.status, "text": report.summary(), "report": json.loads(report.to_json())}
    return MARK + json.dumps(content)


class Display:
    """Shows a log on stderr line by line, and keeps the report that is in it."""

    def __init__(self) -> None:
        self.rest = ""
        self.report: dict[str, Any] | None = None

    def show(self, piece: str) -> None:
        *lines, self.rest = (self.rest + piece).split("\n")
        for text in lines:
            self._line(text)

    def close(self) -> None:
        if self.rest:
            self._line(self.rest)

    def _line(self, text: str) -> None:
        if text.startswith(MARK):
            self.report = json.loads(text.removeprefix(MARK))
        else:
            print(text, file=sys.stderr, flush=True)


def reach(address: str | None) -> Any:
    """The client of the cluster's job server.

    Raises:
        InputError: there is none at this address.
    """
    try:
        return connect(address)
    except Unreachable as error:
        raise InputError(str(error)) from None


def run_attach(job: str, address: str | None) -> Followed:
    """Follow a job from the beginning of its log; see `follow`."""
    return follow(reach(address), job)


def follow(client: Any, job: str, *, as_json: bool = False, patience_s: float = PATIENCE_S) -> Followed:
    """Follow a job to its end; its report.

    Raises:
        InputError: there is no such job.
        Ended: it ended without a report, or is out of reach, or whoever looks on pressed Ctrl-C.
    """
    display = Display()
    try:
        info = Follower(client, job, display.show, patience_s=patience_s).follow()
    except Unknown as error:
        raise InputError(str(error)) from None
    except Unreachable as error:
        raise Ended(str(error), 1) from None
    except KeyboardInterrupt:
        raise Ended(
            f"{job} goes on; nightloom attach {job} follows it again, nightloom stop {job} ends it", 130
        ) from None
    finally:
        display.close()
    if display.report is not None:  # whose status says what the exit status is
        return Followed(**display.report, as_json=as_json)
    if info.status == "STOPPED":
        raise Ended(f"{job} was stopped", 130)
    if not info.driver_exit_code:
        reason = (info.message or "it gave no report").strip().splitlines()[0]
        raise Ended(f"{job} failed: {reason}", 1)
    # A shell says 128 + n of a process that signal n ended, Python says -n.
    status = info.driver_exit_code if info.driver_exit_code > 0 else 128 - info.driver_exit_code
    raise Ended(f"{job} ended with status {status}; the reason stands above", status)


def run_jobs(address: str | None, *, last: int) -> Listed:
    """The jobs that were submitted to a cluster, the newest last."""
    return Listed("jobs", "done", [describe(info) for info in submitted(reach(address))][-last:])


def submitted(client: Any) -> Sequence[Any]:
    """What the server knows of every job that was submitted, in the order of their start."""
    jobs = [info for info in client.list_jobs() if info.submission_id]
    return sorted(jobs, key=lambda info: info.start_time or 0)


def describe(info: Any) -> dict[str, Any]:
    begun = datetime.fromtimestamp(info.start_time / 1000) if info.start_time else None
    took = (info.end_time - info.start_time) / 1000 if info.start_time and info.end_time else None
    return {
        "id": info.submission_id,
        "status": str(getattr(info.status, "value", info.status)),
        "started": begun and begun.strftime("%Y-%m-%d %H:%M"),
        "took": clock(took) if took is not None else None,
        "command": re.sub(r"^exec python -m jobs\.cli ", "nightloom ", info.entrypoint or ""),
    }


def run_stop(job: str, address: str | None) -> Listed:
    """Tell a job to stop.

    Raises:
        InputError: there is no such job.
    """
    client = reach(address)
    try:
        info = find_job(client, job)
    except Unknown as error:
        raise InputError(str(error)) from None
    running = client.stop_job(job)
    return Listed("stop", "stopping" if running else "ended", [describe(info)])
