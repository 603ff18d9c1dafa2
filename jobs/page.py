"""`nightloom report`: one HTML page about a table: its newest run, the nights before, and a look at its vectors.

The page is whole in itself: no script, nothing from a network, and its policy forbids both. Everything that came from a
corpus, a model or a machine is escaped. Titles say what was found; the numbers behind each chart stand below it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

from jobs import findings
from jobs.history import run_versions
from jobs.report import clock
from jobs.vector_map import VectorMap, nearest_documents, sample_vectors
from model.errors import InputError
from pipeline import storage
from pipeline.dead import list_letters
from pipeline.ledger import read_records
from pipeline.table import PAGE, PUBLISHED, EmbeddingTable

MOST_NIGHTS = 30
"""Runs that the page goes back."""
NIGHTS_SHOWN = 7
"""Runs whose rows are in sight."""
MOST_DEAD = 25
"""Dead documents that are named; all are counted."""
LONG_WORD = 18
STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True, slots=True)
class PageReport:
    """What `nightloom report` did."""

    job: str
    status: str
    table: str
    page: str
    bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        return f"{self.page} shows {self.table} ({self.bytes:,} bytes)."


def run_report(uri: str, out: str | None = None) -> PageReport:
    """Write the page of a table, by default beside the table itself.

    Raises:
        InputError: there is no table, or `out` cannot be written.
    """
    text = make_page(uri).encode()
    target = out or f"{uri.rstrip('/')}/{PAGE}"
    files, path = storage.filesystem(target)
    try:
        with files.open_output_stream(path) as stream:
            stream.write(text)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {storage.first_words(error)}") from None
    return PageReport("report", "done", uri, target, len(text))


def make_page(uri: str) -> str:
    """The page of a table as HTML.

    Raises:
        InputError: there is no table.
    """
    table = EmbeddingTable.open(uri)
    records = [r for r in read_records(uri, last=2 * MOST_NIGHTS) if r["job"] in findings.NIGHTS][-MOST_NIGHTS:]
    published = EmbeddingTable.open(uri, PUBLISHED) if table.published_version() is not None else None
    drawn = sample_vectors(published) if published else None
    name = PurePosixPath(table.uri).name.removesuffix(".lance")
    newest, worked = findings.newest(records), findings.newest_with_work(records)
    which = "The newest run" if worked in (newest, None) else f"The newest run with work, {findings.night_of(worked)}"
    head = findings.headline(newest)
    body = [
        f'<header><p class="name">{escape(name)}</p><h1>{escape(head)}</h1>',
        f'<p class="where">{escape(table.uri)}</p></header>',
        tiles(findings.key_numbers(newest)),
        section(which, [*charts_of_run(worked), gates(worked or newest), dead(table)]),
        section("The nights", [*charts_of_nights(records), versions(uri), nights_card(records)]),
        section("The vectors", vectors(published, drawn)),
        section("What it was made with", [settings(table, newest)]),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(name)}: {escape(head)}</title>",
            f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def section(title: str, parts: Iterable[str]) -> str:
    return f'<section><h2>{escape(title)}</h2><div class="cards">{"".join(parts)}</div></section>'


def card_of(content: str, *, title: str = "", width: str = "") -> str:
    """A part of a section: as wide as a chart, as two (`half`), or as the page (`wide`)."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card {width}">{head}{content}</div>'


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """What matters most, large."""
    cells = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(about)}</small></dd></div>"
        for name, value, about in numbers
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def figure(title: str, chart: str, numbers: str, legend: Sequence[str] = (), *, note: str = "", shape: str = "") -> str:
    """A chart under the sentence that says what it shows, the meaning of its colours, and its numbers for who asks."""
    keys = "".join(f'<li><i class="s{i}"></i>{escape(name)}</li>' for i, name in enumerate(legend))
    below = f'<ul class="legend">{keys}</ul>' if legend else ""
    below += f"<p>{escape(note)}</p>" if note else ""
    details = f"<details><summary>The numbers</summary>{numbers}</details>"
    return f'<figure class="card {shape}"><figcaption>{escape(title)}</figcaption>{chart}{below}{details}</figure>'


def table_of(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose rows become blocks where the screen is narrow: every cell knows its heading."""
    texts = [[shown(value) for value in row] for row in rows]
    used = [at for at in range(len(heads)) if any(row[at] for row in texts)]
    numbers = [all(is_number(row[at]) for row in texts) for at in range(len(heads))]
    top = "".join(f'<th scope="col"{" class=n" * numbers[at]}>{escape(heads[at])}</th>' for at in used)

    def cell(row: list[str], at: int) -> str:
        return f'<td data-label="{escape(heads[at])}"{cell_class(row[at])}>{escape(row[at])}</td>'

    lines = ["<tr>" + "".join(cell(row, at) for at in used) + "</tr>" for row in texts]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def is_number(text: str) -> bool:
    """Whether a cell stands at the right of its column."""
    return re.fullmatch(r"[\d,.e+-]*%?", text) is not None


def cell_class(text: str) -> str:
    """How a cell is set: numbers in columns, and words that may be broken because nobody could break them."""
    long = any(len(word) > LONG_WORD for word in re.split(r"[\s-]", text))
    number = ' class="n zero"' if text == "0" else " class=n"
    return number if is_number(text) else " class=long" if long else ""


def charts_of_nights(records: list[dict[str, Any]]) -> list[str]:
    """How fast, and how much, night after night."""
    from jobs import charts

    nights = [record for record in records if record.get("report")]
    found = []
    worked = [record for record in nights if record.get("embedding_s")]
    if worked:
        labels, speeds = findings.labels_of(worked), [r["tokens"] / r["embedding_s"] for r in worked]
        title = findings.speed_of_nights(speeds)
        chart = charts.draw("speed", title, charts.bars_of_nights(labels, [speeds], "tokens a second"))
        rows = [
            [r["run"], r["tokens"], round(r["embedding_s"], 1), round(s)] for r, s in zip(worked, speeds, strict=True)
        ]
        found.append(figure(title, chart, table_of(["run", "tokens", "seconds", "tokens a second"], rows)))
    if nights:
        names = ["embedded", "left", "dead"]
        series = [[r["report"][name] for r in nights] for name in names]
        title = findings.documents_of_nights(nights)
        paint = charts.bars_of_nights(findings.labels_of(nights), series, "documents")
        rows = [[r["run"], *(r["report"][name] for name in names)] for r in nights]
        found.append(figure(title, charts.draw("documents", title, paint), table_of(["run", *names], rows), names))
    return found


def nights_card(records: list[dict[str, Any]]) -> str:
    """Every attempt, the newest first; what is older than a week is folded away."""
    if not records:
        return ""
    newest, older = records[-NIGHTS_SHOWN:], records[:-NIGHTS_SHOWN]
    folded = f"<details><summary>{len(older)} before these</summary>{nights_table(older)}</details>" if older else ""
    return card_of(nights_table(newest) + folded, width="wide")


def nights_table(records: list[dict[str, Any]]) -> str:
    counts = ("read", "embedded", "unchanged", "left", "dead", "deleted", "tokens")
    rows = [
        [
            record.get("started", "").replace("T", " ").rstrip("Z"),
            record["status"],
            clock(record["seconds"]) if "seconds" in record else "",
            *(record.get("report", {}).get(name) for name in counts),
            record.get("published"),
            "; ".join(record.get("reasons", [])) or record.get("error"),
        ]
        for record in reversed(records)
    ]
    return table_of(["started (UTC)", "status", "time", *counts, "readers see", "why"], rows)


def charts_of_run(record: dict[str, Any] | None) -> list[str]:
    """The newest run that embedded something, from within."""
    from jobs import charts

    if record is None:
        return [card_of("<p>No run has embedded anything yet.</p>")]
    found = []
    if (rates := findings.rates(record)) is not None:
        seconds, values = rates
        title = findings.course(record, seconds, values)
        chart = charts.draw("course", title, charts.line_over_time(seconds, values, "tokens a second"))
        rows = [[round(float(s), 1), round(float(v))] for s, v in zip(seconds, values, strict=True)]
        found.append(figure(title, chart, table_of(["until second", "tokens a second"], rows)))
    if record.get("lengths"):
        edges, counts = zip(*record["lengths"], strict=True)
        title, median = findings.lengths(record)
        chart = charts.draw("lengths", title, charts.lengths(edges, counts, median))
        found.append(figure(title, chart, table_of(["tokens from", "documents"], record["lengths"])))
    if outcome := findings.outcome(record):
        title = findings.plan_and_outcome(record)
        shares = [(name, done / planned) for name, planned, done in outcome if planned]
        chart = charts.draw("plan", title, charts.shares(*zip(*shares, strict=True)), height=50 + 42 * len(shares))
        found.append(figure(title, chart, table_of(["", "planned", "outcome"], outcome)))
    return found


def gates(record: dict[str, Any] | None) -> str:
    """Every gate with what it saw."""
    rows = findings.gate_rows(record or {})
    if not rows:
        return card_of("<p>This run came to no gate.</p>", title="Gates: nothing to judge", width="half")
    refused = [row[0] for row in rows if row[-1] != "passed"]
    title = f"Gates: refused by {', '.join(refused)}" if refused else f"Gates: all {len(rows)} passed"
    return card_of(table_of(["gate", "found", "allowed", "result"], rows), title=title, width="half")


def dead(table: EmbeddingTable) -> str:
    """Documents that could not be embedded, and why."""
    letters = list_letters(table)
    if not letters:
        return card_of("<p>Every document that was tried has its vectors.</p>", title="Dead letters: none")
    kinds = Counter((letter["stage"], letter["error"]) for letter in letters).most_common(MOST_DEAD)
    content = table_of(["documents", "stage", "reason"], [[count, *kind] for kind, count in kinds])
    names = [[letter[name] or "?" for name in ("document_id", "source", "attempts")] for letter in letters[:MOST_DEAD]]
    which = f"The first {len(names)}" if len(letters) > len(names) else "Which ones"
    content += f"<details><summary>{which}</summary>{table_of(['document', 'source', 'tried'], names)}</details>"
    return card_of(content, title=f"Dead letters: {len(letters):,} document{'s' * (len(letters) != 1)} without vectors")


def vectors(table: EmbeddingTable | None, drawn: VectorMap | None) -> list[str]:
    """A map of the published vectors, and what lies near what."""
    from jobs import charts

    if table is None or drawn is None:
        return [card_of("<p>Too few vectors are published to draw.</p>")]
    import numpy as np

    title = findings.map_title(drawn)
    groups = [np.flatnonzero(drawn.group == number) for number in range(len(drawn.names))]
    chart = charts.draw("map", title, charts.scatter(drawn.points, groups), height=340)
    counts = table_of(
        ["source", "vectors drawn"], [[name, len(g)] for name, g in zip(drawn.names, groups, strict=True)]
    )
    note = findings.map_caption(drawn)
    found = [figure(title, chart, counts, drawn.names, note=note, shape="tall")]
    for near in nearest_documents(table, drawn):
        found.append(card_of(neighbours(near.found), title=f"Nearest to {near.asked['document_id']}"))
        found[-1] = found[-1].replace("</h3>", f"</h3>{excerpt(near.asked)}", 1)
    return found


def neighbours(rows: list[dict[str, Any]]) -> str:
    items = [
        f"<li><b>{escape(row['document_id'])}</b> <span>{row['score']:.3f}</span>{excerpt(row)}</li>" for row in rows
    ]
    return f'<ol class="near">{"".join(items)}</ol>' if items else "<p>No other document.</p>"


def excerpt(row: dict[str, Any]) -> str:
    return f"<p>{escape(row['snippet'])}</p>" if row["snippet"] else ""


def settings(table: EmbeddingTable, record: dict[str, Any] | None) -> str:
    """The recipe, and where the newest run ran."""
    rows: list[tuple[str, Any]] = [("model", table.model), *asdict(table.recipe).items()]
    rows += [("fingerprint", table.fingerprint)]
    rows += [(name, (record or {}).get(name)) for name in ("host", "run")]
    kept = [(name, value) for name, value in rows if value not in (None, "", ())]
    cells = [f"<div><dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd></div>" for name, value in kept]
    return card_of(f'<dl class="facts">{"".join(cells)}</dl>', title="One recipe decides every vector", width="wide")


def versions(uri: str) -> str:
    report = run_versions(uri)
    rows = [[v.version, v.time, v.rows, v.documents, v.status] for v in reversed(report.versions)]
    kept = sum(v.status == "kept" for v in report.versions)
    title = f"Versions: {kept} to go back to" if kept else "Versions: none to go back to yet"
    return card_of(table_of(["version", "made (UTC)", "rows", "documents", "status"], rows), title=title)
