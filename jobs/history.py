"""`nightloom runs`, `versions` and `rollback`: what happened to a table, what readers could see, and the way back.

A rollback moves the tag that readers open, and nothing else: the newest version stays, and the next run goes on from
there. It shows its version when it changes the table; a run that finds nothing to do leaves readers where they are.
"""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import Any

from jobs.report import clock
from model.errors import InputError
from pipeline.lease import Lease
from pipeline.ledger import ROLLED_BACK, new_run, read_records, recorded
from pipeline.table import EmbeddingTable

DONE = "done"
SHOWN_RUNS = 20
"""Runs that are listed unless more are asked for."""
LONG = ("dead", "lengths", "timeline")
"""Parts of a record that make long lists."""


@dataclass(frozen=True, slots=True)
class RunsReport:
    """The ledger of a table, oldest run first."""

    job: str
    status: str
    table: str
    runs: list[dict[str, Any]]
    """The records, without what is LONG of them."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        if not self.runs:
            return f"No run has written to {self.table} yet."
        heads = ("started", "job", "status", "time", "read", "embedded", "unchanged", "dead", "deleted", "tokens")
        return drawn([*heads, "version", "published", "error"], [row_of(run) for run in self.runs])


def row_of(run: dict[str, Any]) -> list[str]:
    """A run as the cells of `nightloom runs`."""
    report = run.get("report", {})
    counts = [number(report.get(name)) for name in ("read", "embedded", "unchanged", "dead", "deleted", "tokens")]
    time = clock(run["seconds"]) if "seconds" in run else ""
    versions = [moved(run.get(f"{name}_before"), run.get(name)) for name in ("version", "published")]
    return [run.get("started", run["run"]), run["job"], run["status"], time, *counts, *versions, run.get("error", "")]


def moved(before: int | None, after: int | None) -> str:
    """3 -> 7, or 7 where nothing moved, or where it began."""
    if after is None:
        return ""
    return str(after) if before in (None, after) else f"{before} -> {after}"


def run_runs(table: str, *, last: int = SHOWN_RUNS) -> RunsReport:
    """The last runs that wrote to a table.

    Raises:
        InputError: there is neither a table nor a record of a run.
    """
    records = read_records(table, last=last)
    if not records:
        EmbeddingTable.open(table)
    kept = [{name: value for name, value in record.items() if name not in LONG} for record in records]
    return RunsReport("runs", DONE, table, kept)


@dataclass(frozen=True, slots=True)
class Version:
    """A version that readers see, could see by a rollback, or will see."""

    version: int
    time: str
    """When it was made, in UTC."""
    run: str | None
    """The run that published it; None where the ledger does not say."""
    rows: int
    documents: int | None
    status: str
    """published: what readers see; kept: a rollback can go there; newest: where the next run begins."""


@dataclass(frozen=True, slots=True)
class VersionsReport:
    """The versions of a table that matter, ascending."""

    job: str
    status: str
    table: str
    versions: list[Version]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        rows = [
            [str(v.version), v.time, v.run or "", number(v.rows), number(v.documents), v.status] for v in self.versions
        ]
        return drawn(["version", "made", "run", "rows", "documents", "status"], rows)


def run_versions(uri: str) -> VersionsReport:
    """The version that readers see, those that a rollback can go to, and the newest.

    Raises:
        InputError: there is no table.
    """
    table = EmbeddingTable.open(uri)
    published, kept = table.published_version(), table.kept_versions()
    shown_by = {record["version"]: record for record in read_records(uri) if "documents" in record}
    found = []
    for made in table.dataset.versions():
        number = made["version"]
        if number not in kept and number != table.version:
            continue
        status = "published" if number == published else "kept" if number in kept else "newest"
        record = shown_by.get(number, {})
        # Lance gives local time without saying so.
        time = made["timestamp"].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        rows = int(made["metadata"]["total_rows"])
        found.append(Version(number, time, record.get("run"), rows, record.get("documents"), status))
    return VersionsReport("versions", DONE, table.uri, found)


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What `nightloom rollback` did."""

    job: str
    status: str
    table: str
    before: int
    """The version that readers saw."""
    published: int
    """The version that they see now."""
    newest: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        if self.before == self.published:
            return f"Readers of {self.table} see version {self.published} already."
        after = f"Readers of {self.table} see version {self.published} now, no longer {self.before}."
        if self.published == self.newest:
            return after
        return f"{after}\nThe next run goes on from version {self.newest}; it moves them when it changes the table."


def run_rollback(uri: str, version: int | None = None) -> RollbackReport:
    """Let readers see a version that was published before: the one before theirs, or this one.

    Raises:
        InputError: no such version, or another run is writing.
    """
    choose(EmbeddingTable.open(uri), version)  # refuses before anything is written
    run = new_run()
    with Lease.take(uri, run) as lease, recorded(uri, run, "rollback") as entry:
        table = EmbeddingTable.open(uri)
        table.lease = lease
        before, chosen = choose(table, version)
        if chosen != before:
            table.show(chosen)
        entry.set(status=ROLLED_BACK, version=table.version, published_before=before, published=chosen)
    return RollbackReport("rollback", DONE, table.uri, before, chosen, table.version)


def choose(table: EmbeddingTable, version: int | None) -> tuple[int, int]:
    """(the version that readers see, the one that they are to see).

    Raises:
        InputError: there is none, or none such.
    """
    published, kept = table.published_version(), table.kept_versions()
    if published is None:
        raise InputError(f"nothing is published in {table.uri} yet: there is nothing to go back from")
    if version is not None:
        if version not in kept:
            names = ", ".join(map(str, kept))
            raise InputError(
                f"version {version} of {table.uri} was never published, or is not kept any more; kept are {names}"
            )
        return published, version
    earlier = [number for number in kept if number < published]
    if not earlier:
        raise InputError(f"{table.uri} keeps no version that was published before {published}")
    return published, earlier[-1]


def number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def drawn(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, as wide as the terminal; columns that are empty in all rows are left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    used = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for at in used:
        numeric = all(row[at].replace(",", "").isdigit() for row in rows if row[at])
        table.add_column(heads[at], justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[at] for at in used))
    text = io.StringIO()
    Console(file=text, width=max(shutil.get_terminal_size((160, 24)).columns, 60), markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
