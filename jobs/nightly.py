"""`nightloom nightly`: tables brought up to date the way a scheduler wants it, by a command that may start at any time.

A start that finds another at work leaves it alone and is content: the work is being done. Every start leaves one record
in the table's ledger, `TABLE/_runs/RUN.json`, which is the report of the night, and a page for people beside the table.
A table that fails does not keep the next one from its night.
"""

import json
import logging
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydantic import Field, field_validator

from jobs.commands import default_model
from jobs.configuration import EmbedConfiguration, Settings
from jobs.embed import limit_of, run_embed
from jobs.migrate import run_migrate
from jobs.report import BAD_ENDS, line
from model.errors import InputError
from model.folder import resolve_folder, weights_hash
from pipeline import storage
from pipeline.lease import Busy
from pipeline.ledger import BUSY, FAILED, REFUSED, new_run, note, read_records
from pipeline.storage import local_model
from pipeline.table import EmbeddingTable

log = logging.getLogger(__name__)

JOB, DONE, UNPUBLISHED = "nightly", "done", "unpublished"
FEWEST_DIGITS = 8


class NightlyTable(EmbedConfiguration):
    """One table: the settings of `nightloom embed`, and these."""

    weights: str | None = Field(default=None, min_length=FEWEST_DIGITS)
    """Hash of the model's weights, or its beginning: with any other model under that name the night is refused."""
    patience_h: float = Field(default=24.0, gt=0)
    """A start that finds another run at work is content, unless that one has been at it for so many hours."""
    page: bool = True
    """Write a page about the table beside it (`nightloom report`)."""


class NightlyConfiguration(Settings):
    """Everything that `nightloom nightly` can be told."""

    tables: dict[str, NightlyTable] = Field(min_length=1)
    """The tables, in the order in which they have their turn."""

    @field_validator("tables", mode="before")
    @classmethod
    def _with_models(cls, tables: Any) -> Any:
        """As on the command line, the model that comes with nightloom where none is named."""
        if not isinstance(tables, dict):
            return tables
        return {
            name: {"model": default_model(), **table} if isinstance(table, dict) else table
            for name, table in tables.items()
        }


@dataclass(frozen=True, slots=True)
class Night:
    """What became of one table."""

    table: str
    run: str
    """Names the record: TABLE/_runs/RUN.json."""
    status: str
    """published, unchanged, partial or unpublished, as `embed` has them; busy: another run is at it; refused: input or
    configuration is wrong; failed: anything else."""
    reason: str | None = None
    page: str | None = None
    report: dict[str, Any] | None = None
    """That of `embed`, where it came so far."""


@dataclass(frozen=True, slots=True)
class NightlyReport:
    """What a night came to."""

    job: str
    status: str
    """done, unpublished, refused or failed: the worst of the tables."""
    tables: dict[str, Night]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        lines = []
        for name, night in self.tables.items():
            lines.append(line(name, night.reason or sentence(night)))
            if night.page:
                lines.append(line("", f"see {night.page}"))
        return "\n".join([f"The night is {self.status}.", "", *lines])


def sentence(night: Night) -> str:
    report = night.report or {}
    done = f"{night.status}: {report['embedded']:,} of {report['read']:,} documents embedded"
    if report["left"]:
        done += f", {report['left']:,} left for the next night"
    return f"{done}; readers see version {report['published']}"


def run_nightly(configuration: NightlyConfiguration) -> NightlyReport:
    """Give every table its night.

    Raises:
        InputError: a deadline is no time of day; nothing was begun.
    """
    begun = datetime.now()
    for settings in configuration.tables.values():
        limit_of(settings, begun)
    nights = {name: run_night(name, settings, begun) for name, settings in configuration.tables.items()}
    became = {night.status for night in nights.values()}
    return NightlyReport(JOB, next((status for status in BAD_ENDS if status in became), DONE), nights)


def run_night(name: str, settings: NightlyTable, begun: datetime) -> Night:
    """Bring one table up to date. Whatever goes wrong is told in the result."""
    run, report = new_run(), None
    status, reason, there = FAILED, "", False
    embed = run_migrate if settings.migrate else run_embed
    try:
        check_pin(settings)
        report = embed(settings, job=JOB, run=run, begun=begun)
        status = report.status
        if status == UNPUBLISHED:
            reason = "; ".join(["not published", *reasons_of(settings.table, run)])
    except Busy as busy:
        status, reason, there = BUSY, str(busy), True
        if busy.owner.hours() > settings.patience_h:
            status, reason = FAILED, f"{busy.owner} has been at it for {busy.owner.hours():.0f} hours: look after it"
    except InputError as error:
        status, reason = REFUSED, str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {storage.last_words(error)}"
        log.debug("traceback", exc_info=True)
    if report is None:
        log.error("%s: %s", name, reason)
        remember(settings.table, run, status, there=there, error=storage.without_secrets(reason))
    elif settings.migrate:  # whose runs are recorded in the table that grows
        remember(settings.table, run, status, report=asdict(report))
    page = None if status == BUSY or not settings.page else write_page(settings.table)
    return Night(settings.table, run, status, reason or None, page, asdict(report) if report else None)


def reasons_of(table: str, run: str) -> list[str]:
    """Why a run was not published, as its record has it."""
    return [reason for r in read_records(table, last=1) if r["run"] == run for reason in r.get("reasons", [])]


def check_pin(settings: NightlyTable) -> None:
    """Refuse a model whose weights are not those that were pinned.

    Raises:
        InputError: naming both.
    """
    if settings.weights is None:
        return
    found = weights_hash(resolve_folder(local_model(settings.model)))
    if not found.startswith(settings.weights):
        raise InputError(f"{settings.model} has the weights {found}, the night is pinned to {settings.weights}")


def remember(table: str, run: str, status: str, *, there: bool = False, **facts: Any) -> None:
    """Leave a record of a start, unless it has one, or there is no table to keep it in."""
    try:
        if there or EmbeddingTable.find(table) is not None:
            note(table, run, JOB, status, **facts)
    except Exception as error:
        log.warning("the record of run %s is not kept: %s", run, storage.first_words(error))


def write_page(table: str) -> str | None:
    """The page of `nightloom report`, beside the table; without it the night is no worse."""
    from jobs.page import run_report

    try:
        return run_report(table).page if EmbeddingTable.find(table) else None
    except Exception as error:
        log.warning("there is no new page about %s: %s", table, storage.first_words(error))
        return None
