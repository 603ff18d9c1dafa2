"""`nightloom dead`: the documents that could not be embedded, each with the reason.

They are not tried again until their text changes, or a run has `--retry-dead`. A row that cannot be read is listed
until its file holds something else in its place.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from jobs.history import drawn
from jobs.report import line
from pipeline.dead import list_letters
from pipeline.table import EmbeddingTable

MOST_SHOWN = 200
"""Documents that the summary lists; `--json` lists all."""
MOST_CHARS = 100
"""Length of a reason in the summary."""

STAGES = {
    "read": "its row cannot be read",
    "tokens": "it cannot be tokenized",
    "embed": "the encoder failed on it",
    "quarantine": "it killed the process that worked on it",
}
"""Where a document can die, and what that means."""


@dataclass(frozen=True, slots=True)
class DeadReport:
    """The dead letters of a table, sorted by source and id.

    They are those under the table's recipe as it is now.
    """

    job: str
    status: str
    table: str
    stages: dict[str, int]
    """How many died where."""
    dead: list[dict[str, Any]]
    """document_id, text_hash (hexadecimal), source, stage, error, attempts, first_run, last_run."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        if not self.dead:
            return f"Every document that was read stands in {self.table}, or was left out on purpose."
        head = f"{len(self.dead):,} documents could not be embedded into {self.table}."
        counts = [line(stage, f"{count:,}: {STAGES.get(stage, stage)}") for stage, count in self.stages.items()]
        heads = ["document", "source", "stage", "attempts", "last run", "reason"]
        rows = [
            [
                letter["document_id"] or "",
                letter["source"] or "",
                letter["stage"],
                str(letter["attempts"]),
                letter["last_run"],
                letter["error"][:MOST_CHARS],
            ]
            for letter in self.dead[:MOST_SHOWN]
        ]
        more = (
            [f"... and {len(self.dead) - MOST_SHOWN:,} more; --json lists all"] if len(self.dead) > MOST_SHOWN else []
        )
        advice = "Correct their texts, or try them again with `nightloom embed --retry-dead`."
        return "\n".join([head, "", *counts, "", drawn(heads, rows).rstrip("\n"), *more, "", advice])


def run_dead(uri: str) -> DeadReport:
    """List the dead letters of a table.

    Raises:
        InputError: there is no table, or its letters cannot be read.
    """
    table = EmbeddingTable.open(uri)
    letters = list_letters(table)
    stages = dict(sorted(Counter(letter["stage"] for letter in letters).items()))
    return DeadReport(job="dead", status="done", table=table.uri, stages=stages, dead=letters)
