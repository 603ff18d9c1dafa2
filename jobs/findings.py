"""What the records of a table say in a sentence: the titles of its page, and the numbers that they rest on."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from jobs.charts import short
from jobs.report import clock
from jobs.vector_map import VectorMap
from pipeline.ledger import BUSY, CRASHED, FAILED, INTERRUPTED, REFUSED, RUNNING

NIGHTS = ("embed", "nightly", "migrate")
"""Jobs whose records are nights."""
MOST_RATES = 60
"""Steps of the course of a run: more than that is noise."""
ENDED_BADLY = {
    FAILED: "The newest run failed",
    REFUSED: "The newest run was refused",
    CRASHED: "The newest run crashed; what it had committed is kept",
    INTERRUPTED: "The newest run was interrupted; what it had committed is kept",
    RUNNING: "A run is at work",
}


def newest(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest attempt; one that only found another at work is none."""
    return next((record for record in reversed(records) if record["status"] != BUSY), None)


def newest_with_work(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record.get("tokens") and record.get("report")), None)


def headline(record: dict[str, Any] | None) -> str:
    """What became of the newest run."""
    if record is None:
        return "No run has written to this table yet"
    status, report = record["status"], record.get("report")
    if report is None:
        said = record.get("error", "")
        return f"{ENDED_BADLY.get(status, f'The newest run ended as {status}')}{': ' * bool(said)}{said}"
    documents = f"{report['embedded']:,} document{'s' * (report['embedded'] != 1)}"
    if status == "unpublished":
        return f"Not published: {(record.get('reasons') or ['see the gates'])[0]}"
    if status == "partial":
        return f"{documents} embedded, {report['left']:,} left for the next night"
    if status == "unchanged" or not report["embedded"]:
        return f"Nothing to embed: {report['read']:,} documents are up to date"
    return f"{documents} embedded in {joined(clock(record['seconds']))}, and readers see them"


def key_numbers(record: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(name, value, about) of what matters most."""
    report = (record or {}).get("report")
    if record is None or not report:
        return []
    share = report["embedded"] / report["read"] if report["read"] else 0.0
    found = [
        ("documents", short(report["read"]), f"{share:.0%} of them embedded this time"),
        ("dead", f"{report['dead']:,}", "could not be embedded"),
        ("version", str(record.get("published") or "none"), "is what readers see"),
    ]
    if record.get("embedding_s"):
        found[1:1] = [
            ("tokens", short(record["tokens"]), f"in {clock(record['embedding_s'])}"),
            ("tokens a second", short(record["tokens"] / record["embedding_s"]), "start of the workers included"),
            ("padding", f"{report['padding']:.1%}", "of the encoder's positions"),
        ]
    return found


def joined(text: str) -> str:
    """A text that is not broken into lines."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def night_of(record: dict[str, Any]) -> str:
    """The start of a run as a label: 27 Nov."""
    started = datetime.strptime(record["started"], "%Y-%m-%dT%H:%M:%SZ")
    return f"{started.day} {started:%b}"


def labels_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """A label for each run: its day, or its time where all are of one day."""
    days = [night_of(record) for record in records]
    return days if len(set(days)) > 1 or len(days) == 1 else [record["started"][11:16] for record in records]


def speed_of_nights(speeds: Sequence[float]) -> str:
    if len(speeds) == 1:
        return f"The only run with work embedded {short(speeds[0])} tokens a second"
    usual = float(np.median(speeds[:-1]))
    change = speeds[-1] / usual - 1
    if abs(change) < 0.05:
        return f"{short(speeds[-1])} tokens a second, as the nights before"
    return f"{short(speeds[-1])} tokens a second, {abs(change):.0%} {'faster' if change > 0 else 'slower'} than usual"


def documents_of_nights(nights: Sequence[dict[str, Any]]) -> str:
    total = sum(record["report"]["embedded"] for record in nights)
    left = nights[-1]["report"]["left"]
    rest = f"; {left:,} wait for the next" if left else "; nothing is left over"
    return f"{total:,} documents embedded in {len(nights)} night{'s' * (len(nights) != 1)}{rest}"


def rates(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(seconds at which steps of a run end, tokens a second within them); None for a record that does not say.

    The sums of a timeline are read off at even distances, so that what arrives in one moment is spread over the time
    that it took.
    """
    rows = np.array(record.get("timeline", {}).get("rows", []), float)
    if len(rows) < 2 or rows[-1, 0] <= 0:
        return None
    steps = min(MOST_RATES, len(rows) - 1)
    seconds = np.linspace(0, rows[-1, 0], steps + 1)
    tokens = np.interp(seconds, rows[:, 0], rows[:, 2])
    return seconds[1:], np.diff(tokens) / np.diff(seconds)


def course(record: dict[str, Any], seconds: np.ndarray, values: np.ndarray) -> str:
    """When vectors began to arrive, and how steadily."""
    rows = record["timeline"]["rows"]
    first = rows[1][0]
    if len(values) < 4:
        return f"The vectors arrived in {len(rows) - 1} part{'s' * (len(rows) != 2)}, the first after {clock(first)}"
    going = values[np.searchsorted(seconds, first) + 1 :]  # steps that begin after the first arrival
    low = float(np.percentile(going, 10) / max(np.median(going), 1e-9)) if len(going) else 1.0
    steady = "steady to the end" if low > 0.7 else f"at times only {low:.0%} of the usual speed"
    return f"First vectors after {clock(first)}, then {steady}"


def lengths(record: dict[str, Any]) -> tuple[str, float]:
    """(a sentence, about the median of the documents' tokens)."""
    edges, counts = (np.array(column) for column in zip(*record["lengths"], strict=True))
    sums = np.cumsum(counts)
    at = int(np.searchsorted(sums, sums[-1] / 2))
    within = (sums[-1] / 2 - (sums[at] - counts[at])) / counts[at]
    median = float(edges[at] * 2 ** (within / 2))
    padding = record["report"]["padding"]
    wasted = "no position was padding" if not padding else f"{padding:.1%} of the positions were padding"
    return f"Half of the documents have under {round_to_two(median):,} tokens; {wasted}", median


def round_to_two(value: float) -> int:
    """To two digits: what is read off a histogram is no better."""
    size = 10 ** max(0, int(np.log10(max(value, 1))) - 1)
    return round(value / size) * size


def outcome(record: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, planned, what came of it)."""
    planned = record.get("planned")
    if not planned or not planned["documents"]:
        return []
    found = [("documents", planned["documents"], record["report"]["embedded"])]
    if planned["tokens"]:
        found.append(("tokens", planned["tokens"], record["tokens"]))
    if planned["seconds"]:
        found.append(("seconds", round(planned["seconds"]), round(record["embedding_s"])))
    return found


def plan_and_outcome(record: dict[str, Any]) -> str:
    planned, report = record["planned"], record["report"]
    missing = planned["documents"] - report["embedded"]
    done = f"All {planned['documents']:,} planned documents were embedded"
    if missing:
        done = f"{report['embedded']:,} of {planned['documents']:,} planned documents were embedded"
    if not planned["seconds"]:
        return f"{done}; a first run foresees no time"
    ratio = record["embedding_s"] / planned["seconds"]
    if abs(ratio - 1) < 0.1:
        return f"{done}, in the time foreseen"
    return f"{done}, in {clock(record['embedding_s'])} where {clock(planned['seconds'])} were foreseen"


def gate_rows(record: dict[str, Any]) -> list[list[str]]:
    """[gate, found, allowed, result] of every gate that a run came to."""
    refused = {reason.partition(":")[0] for reason in record.get("reasons", [])}
    rows = []
    for gate, seen in record.get("gates", {}).items():
        if gate == "max_dead":
            rows.append([gate, f"{seen['dead']:,} dead documents", f"{seen['most']:,}"])
        elif gate == "vectors" and not seen:  # the column itself is not the recipe's: nothing was counted
            rows.append([gate, "a column of another type", "none"])
        elif gate == "vectors":
            bad = seen["not_finite"] + seen["odd_length"] + seen.get("disagreeing", 0)
            rows.append([gate, f"{bad:,} bad of {seen['rows']:,} vectors", "0"])
            rows.append(["collapse", f"{seen['identical']:.1%} shared by another text", "50%"])
            rows.append(["collapse", f"{seen['dead_dimensions']:.1%} of dimensions without variance", "50%"])
        else:
            rows.append([gate, f"{seen['distance']:.2g} from the known vectors", f"{seen['bound']:.2g}"])
    return [[*row, "refused" if row[0] in refused else "passed"] for row in rows]


def map_title(drawn: VectorMap) -> str:
    own, chance = drawn.own_kind()
    if len(drawn.names) == 1:
        return f"{len(drawn.rows):,} of {drawn.total:,} vectors, all of one source"
    return f"{own:.0%} of the documents are nearest to one of their own source; by chance {chance:.0%} would be"


def map_caption(drawn: VectorMap) -> str:
    which = "all" if len(drawn.rows) == drawn.total else f"{len(drawn.rows):,} of the {drawn.total:,}"
    return (
        f"The map shows {which} vectors in their first two principal directions, which hold {drawn.held:.0%} of the "
        "variance: what is far apart here is far apart, what is near may still differ."
    )
