"""The ledger of a table: one record for each run that wrote to it, `TABLE/_runs/RUN.json`.

A record is written when a run begins and again when it ends, however it ends. A run that was killed could not do the
second: who reads its record sees that it is running while its lease is not held any more, and calls it crashed.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from pipeline import storage
from pipeline.lease import holder

log = logging.getLogger(__name__)

RECORDS = "_runs"
"""Folder in the table."""
RUNNING, FAILED, INTERRUPTED, CRASHED = "running", "failed", "interrupted", "crashed"
BUSY, REFUSED = "busy", "refused"
"""What a run's record says beside the statuses of reports."""
ROLLED_BACK = "rolled back"
RUNS_OF_PACE = 10
"""Runs that `past_pace` goes by: machines and corpora change."""
RECORDS_OF_PACE = 100
"""Among so many records: most nights may have had nothing to embed."""
MOST_START_S = 120.0
SHORTEST_S = 0.001


def new_run() -> str:
    """The name of a run: its start in UTC to the microsecond; sorts by time."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


@dataclass(slots=True)
class Entry:
    """The record of a run that is under way. What is set is kept when it ends."""

    table: str
    run: str
    facts: dict[str, Any]
    begun: float = field(default_factory=time.monotonic)

    def set(self, **facts: Any) -> None:
        """Add to the record: JSON values."""
        self.facts |= facts

    def seconds(self) -> float:
        return round(time.monotonic() - self.begun, 3)

    def keep(self) -> None:
        """Write the record as it is now."""
        keep_record(self.table, self.run, self.facts)


@contextmanager
def recorded(table: str, run: str, job: str, **facts: Any) -> Iterator[Entry]:
    """Keep a record of what happens in the block; needs the table's lease. The block sets `status`.

    An error or an interruption ends the record as `failed` or `interrupted`, with one line about it.
    """
    about = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": utc()}
    entry = Entry(table, run, {**about, "status": RUNNING, **facts})
    entry.keep()
    try:
        yield entry
    except BaseException as error:
        # Ray makes a SystemExit of SIGTERM.
        status = INTERRUPTED if isinstance(error, (KeyboardInterrupt, SystemExit)) else FAILED
        entry.set(status=status, ended=utc(), seconds=entry.seconds())
        if status == FAILED:
            entry.set(error=storage.last_words(error))
        try:
            entry.keep()
        except Exception as second:
            log.warning("the record of run %s is not kept: %s", run, storage.first_words(second))
        raise
    assert entry.facts["status"] != RUNNING, "a run ends with a status"
    entry.set(ended=utc(), seconds=entry.seconds())
    entry.keep()


def note(table: str, run: str, job: str, status: str, **facts: Any) -> None:
    """The record of a start that never held the table's lease; one that is there stays."""
    files, path = storage.filesystem(table)
    if files.get_file_info(f"{path.rstrip('/')}/{RECORDS}/{run}.json").type == FileType.NotFound:
        about = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": utc(), "ended": utc()}
        keep_record(table, run, {**about, "status": status, **facts})


def utc() -> str:
    """Now, as 2026-11-23T18:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def keep_record(table: str, run: str, record: dict[str, Any]) -> None:
    """Write a record, in place of what was there."""
    files, path = storage.filesystem(table)
    target = f"{path.rstrip('/')}/{RECORDS}/{run}.json"
    body = json.dumps({"run": run, **record}, indent=1, sort_keys=True).encode()
    if not isinstance(files, LocalFileSystem):
        with files.open_output_stream(target) as stream:
            stream.write(body)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    draft = f"{target}.draft"
    with open(draft, "wb") as file:
        file.write(body)
    os.replace(draft, target)  # a reader, or a crash, finds a whole record


def read_records(table: str, *, last: int | None = None) -> list[dict[str, Any]]:
    """The records of all runs, or of the `last` ones, oldest first; `crashed` where one cannot be running any more."""
    files, path = storage.filesystem(table)
    selector = FileSelector(f"{path.rstrip('/')}/{RECORDS}", allow_not_found=True)
    names = sorted(info.path for info in files.get_file_info(selector) if info.path.endswith(".json"))
    names = names if last is None else names[max(len(names) - last, 0) :]
    records = [json.loads(files.open_input_stream(name).read()) for name in names]
    if any(record["status"] == RUNNING for record in records):
        writer = holder(table)
        for at, name in enumerate(names):
            if records[at]["status"] == RUNNING and (writer is None or writer.run != records[at]["run"]):
                # It may have ended since it was read.
                records[at] = json.loads(files.open_input_stream(name).read())
                if records[at]["status"] == RUNNING:
                    records[at]["status"] = CRASHED
    return records


def rolled_back(table: str, newest: int, published: int) -> bool:
    """Whether readers are at `published` because a rollback put them there, with `newest` as the newest version."""
    for record in reversed(read_records(table)):
        if record.get("published") not in (None, record.get("published_before")):
            return record["status"] == ROLLED_BACK and (record["version"], record["published"]) == (newest, published)
    return False


def tokens_per(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """Tokens that runs embedded per unit of what their records call `name`; None where none has any of it."""
    known = [record for record in records if record.get(name)]
    return sum(record["tokens"] for record in known) / sum(record[name] for record in known) if known else None


def past_pace(records: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Seconds that workers take to start, and tokens a second from then on, as past runs embedded.

    Of a night with ten new documents nearly all is start, and it says little about a night with a million: so the
    encoder's own time tells how long the rest was, and the shortest rest is taken for the start.
    None where no run has embedded anything yet.
    """
    runs = [record for record in records if record.get("embedding_s") and record.get("tokens")][-RUNS_OF_PACE:]
    if not runs:
        return None
    rests = [run["embedding_s"] - run.get("encoder_s", run["embedding_s"]) / run.get("actors", 1) for run in runs]
    start = min(max(min(rests), 0.0), MOST_START_S)
    seconds = sum(max(run["embedding_s"] - start, SHORTEST_S) for run in runs)
    return start, sum(run["tokens"] for run in runs) / seconds
