"""A table with a month of nights behind it, made without an encoder: for tests of its page, and for looking at it."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from test_pipeline_recipe import RECIPE

from jobs.configuration import EmbedConfiguration
from pipeline.columns import hash_texts
from pipeline.dead import Dead, DeadLetters
from pipeline.keys import hash_ids
from pipeline.ledger import keep_record
from pipeline.measures import count_lengths, shown_lengths
from pipeline.table import EmbeddingTable, write_fragment

DIM = 24
TRICKY = "<script>alert(\"x\")</script> $a_b$ & 'quoted'"
"""An id that would be a program if it were not escaped, and a formula for a careless plot."""


def write_sources(folder: Path, per_source: int) -> dict[str, dict[str, str]]:
    """{file: {id: text}} of three sources, as JSON Lines."""
    found: dict[str, dict[str, str]] = {}
    for name in ("manual", "letters", "news"):
        documents = {
            f"{name}/{n:03}": f"{name.title()} number {n} says something of its own." for n in range(per_source)
        }
        found[str(folder / f"{name}.jsonl")] = documents
    found[str(folder / "news.jsonl")][TRICKY] = f"A text with {TRICKY} in it."
    for file, documents in found.items():
        Path(file).write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in documents.items()))
    return found


def make_rows(documents: dict[str, str], file: str, centre: np.ndarray, draw: np.random.Generator) -> pa.Table:
    vectors = centre + draw.normal(0, 0.12, (len(documents), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    count, texts = len(documents), list(documents.values())
    columns = {"document_id": pa.array(list(documents), pa.string()), "chunk": pa.array([0] * count, pa.int32())}
    for unit in ("char", "token"):
        columns[f"{unit}_start"] = pa.array([0] * count, pa.int64())
        columns[f"{unit}_end"] = pa.array([len(text) for text in texts], pa.int64())
    columns["text_hash"] = hash_texts(pa.array(texts, pa.large_string()))
    columns["source"] = pa.array([file] * count, pa.string())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), DIM)
    return pa.table(columns)


def make_table(folder: Path, *, nights: int = 14, per_source: int = 60, last: dict[str, object] | None = None) -> str:
    """A table whose newest night left some documents over and lost two; `last` changes its record; None takes away.

    Returns:
        Its uri.
    """
    sources, draw = write_sources(folder, per_source), np.random.default_rng(0)
    uri = str(folder / "library.lance")
    table = EmbeddingTable.create(uri, replace(RECIPE, dim=DIM, granularity="document"), model="models/<b>ours</b>")
    fragments = []
    for number, (file, documents) in enumerate(sources.items()):
        centre = np.eye(DIM)[number] + 0.3
        fragments.append(write_fragment(uri, make_rows(documents, file, centre / np.linalg.norm(centre), draw), "r"))
    table.commit(fragments, hash_ids(pa.array([], pa.string())), table.keys(), run="r")
    table.publish()
    died = ((TRICKY, "quarantine", "it killed its worker twice"), ("news/x", "read", "text is 5, not a string"))
    DeadLetters(table).record([Dead.named(name, "/corpus/news.jsonl", *why) for name, *why in died], "r")
    configuration = EmbedConfiguration(source=str(folder), table=uri, model="m").model_dump(mode="json")
    begun = datetime(2026, 11, 1, 1, 0, 4)
    for night in range(nights):
        start = begun + timedelta(days=night)
        record = night_record(start, draw, newest=night == nights - 1)
        about = {"configuration": configuration, "version": table.version, "published": table.version}
        run = start.strftime("%Y%m%dT%H%M%S.000000Z")
        kept = {**record, **about, **((last or {}) if night == nights - 1 else {})}
        keep_record(uri, run, {name: value for name, value in kept.items() if value is not None})
    return uri


def night_record(start: datetime, draw: np.random.Generator, *, newest: bool) -> dict[str, object]:
    """The record of a night as `embed` leaves it."""
    read, new = 48_000 + int(draw.integers(900)), int(draw.integers(900, 2600))
    left, dead = (410, 2) if newest else (0, int(draw.integers(0, 2)))
    speed, lengths = float(draw.normal(4100, 260)), draw.lognormal(6.1, 1.1, new).astype(int)
    tokens = int(lengths.sum())
    seconds = tokens / speed + 9
    arrivals = np.linspace(9, seconds, 40)
    shares = np.cumsum(np.append(0, draw.uniform(0.7, 1.3, 39)))
    rows = [[0.0, 0, 0]]
    rows += [[round(float(t), 2), int(new * s), int(tokens * s)] for t, s in zip(arrivals, shares / shares[-1])]
    report = {"read": read, "embedded": new, "unchanged": read - new - left - dead, "left": left, "dead": dead}
    report |= {"deleted": 3, "tokens": tokens, "padding": 0.0, "truncated_tokens": 0}
    return {
        "job": "nightly",
        "status": "partial" if newest else "published",
        "started": start.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "host": "worker-3",
        "seconds": round(seconds + 21, 1),
        "embedding_s": round(seconds, 1),
        "tokens": tokens,
        "report": report,
        "planned": {
            "documents": new + left + dead,
            "chars": 4 * tokens,
            "tokens": int(tokens * 1.12),
            "seconds": round(seconds * 1.2, 1),
            "new": new,
            "changed": left + dead,
            "deleted": 3,
        },
        "timeline": {"columns": ["seconds", "documents", "tokens"], "rows": rows},
        "lengths": shown_lengths(count_lengths(lengths)),
        "gates": {
            "max_dead": {"dead": dead, "most": 480},
            "canaries": {"distance": 2e-7, "bound": 1e-3},
            "sample": {"distance": 3.1e-7, "bound": 1e-3},
            "vectors": {
                "rows": new,
                "not_finite": 0,
                "odd_length": 0,
                "identical": 0.004,
                "dead_dimensions": 0.0,
            },
        },
    }
