"""Work: which rows of which files are to be embedded, in tables small enough for one reading task each.

The driver handles references to these tables, not the tables. Every planned document has a position, from 0 upward over
all tables of a plan, which travels with it: what comes back is ticked off by position.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import DocumentColumns
from pipeline.documents import read_documents
from pipeline.keys import KEY, hash_ids
from pipeline.packing import look_ahead
from pipeline.storage import SourceFile

CHARS_PER_TABLE = 16_000_000
"""Most text that one reading task goes through: small enough that a lost task is soon repeated."""
MOST_SCANS = 8
"""Tables that a file of lines may be cut into: every one of them has to scan the file up to its last row."""
POSITION = "nightloom.position"
"""Column of a document's position, from reading to writing."""
ROW_BITS = 36
"""A place is a file's number in the listing, shifted by this, plus the row in the file."""

WORK_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("first", pa.int64()),
        ("rows", pa.large_binary()),
        ("ids", pa.large_binary()),
        ("chars", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class WorkTable:
    """What one reading task gets, and what the driver knows of it."""

    rows: Any
    """A table of WORK_SCHEMA, or a reference to one in Ray's object store."""
    documents: int
    chars: int
    """Bytes of text."""

    def load(self) -> pa.Table:
        """The table, brought to this process where it is not."""
        if isinstance(self.rows, pa.Table):
            return self.rows
        import ray

        return ray.get(self.rows)


@dataclass(frozen=True, slots=True)
class Limit:
    """When a run stops, whatever is left of its work; what it did stays."""

    tokens: int | None = None
    """Tokens that the encoder may see."""
    deadline: float | None = None
    """Seconds since the epoch."""

    def reached(self, tokens: int) -> str:
        """Why no more is to be done, or nothing."""
        if self.tokens is not None and tokens >= self.tokens:
            return f"the budget of {self.tokens:,} tokens is used up"
        if self.deadline is not None and time.time() >= self.deadline:
            return f"it is {time.strftime('%H:%M', time.localtime(self.deadline))}"
        return ""


@dataclass(frozen=True, slots=True)
class Todo:
    """Documents that are to be embedded, in the order of their places."""

    places: np.ndarray
    """int64."""
    ids: np.ndarray
    """S16."""
    chars: np.ndarray
    """int32, bytes of text."""
    urgency: np.ndarray
    """uint8; lower goes first."""

    @classmethod
    def join(cls, parts: "Sequence[Todo]") -> "Todo":
        """All of them, in the order of their places."""
        places = np.concatenate([np.empty(0, np.int64), *(part.places for part in parts)])
        order = np.argsort(places)
        return cls(
            places[order],
            np.concatenate([np.empty(0, KEY), *(part.ids for part in parts)])[order],
            np.concatenate([np.empty(0, np.int32), *(part.chars for part in parts)])[order],
            np.concatenate([np.empty(0, np.uint8), *(part.urgency for part in parts)])[order],
        )

    def among(self, low: int, high: int, urgency: int) -> "Todo":
        """Those of one urgency with places in [low, high)."""
        here = slice(*np.searchsorted(self.places, (low, high)))
        chosen = np.flatnonzero(self.urgency[here] == urgency) + here.start
        return Todo(self.places[chosen], self.ids[chosen], self.chars[chosen], self.urgency[chosen])


def cut_work(
    files: Sequence[SourceFile],
    number: int,
    position: int,
    urgency: int,
    chars_per_table: int,
    *todos: Todo,
) -> Iterator[tuple[int, int] | pa.Table]:
    """Cut what is to be done in some consecutive files into tables.

    Args:
        number: of the first of `files` in the listing.
        position: of the first document.
        todos: each may hold documents of any file.

    Yields:
        In turns (documents, bytes of text) and the table of WORK_SCHEMA that holds them.
    """
    low, high = number << ROW_BITS, (number + len(files)) << ROW_BITS
    todo = Todo.join([todo.among(low, high, urgency) for todo in todos])
    places, ids, chars = todo.places, todo.ids, todo.chars.astype(np.int64)
    of_file = places >> ROW_BITS
    bounds = np.append(np.flatnonzero(np.diff(of_file, prepend=-1)), len(places)).tolist()
    waiting: list[dict[str, object]] = []
    documents = size = 0
    for begin, end in itertools.pairwise(bounds):
        file = files[int(of_file[begin]) - number]
        text = int(chars[begin:end].sum())
        most = chars_per_table if file.format == "parquet" else max(chars_per_table, text // MOST_SCANS)
        for part in look_ahead(chars[begin:end], most):
            here = slice(begin + part.start, begin + part.stop)
            some = int(chars[here].sum())
            waiting.append(
                {
                    "file": json.dumps(asdict(file)),
                    "first": position,
                    "rows": (places[here] & ((1 << ROW_BITS) - 1)).tobytes(),
                    "ids": ids[here].tobytes(),
                    "chars": some,
                }
            )
            position += here.stop - here.start
            documents, size = documents + here.stop - here.start, size + some
            if size >= chars_per_table:
                yield documents, size
                yield pa.Table.from_pylist(waiting, schema=WORK_SCHEMA)
                waiting, documents, size = [], 0, 0
    if waiting:
        yield documents, size
        yield pa.Table.from_pylist(waiting, schema=WORK_SCHEMA)


def read_work(items: pa.Table, columns: DocumentColumns, chars_per_table: int) -> Iterator[pa.Table]:
    """Read the documents that a plan chose, in tables of about `chars_per_table` bytes of text, with their POSITION.

    A row whose id is not the surveyed one any more (the file changed since) is left out; the run counts it as dead and
    the next one takes it.
    """
    waiting: list[pa.Table] = []
    size = 0
    for item in items.to_pylist():
        file = SourceFile(**json.loads(item["file"]))
        rows, ids = np.frombuffer(item["rows"], np.int64), np.frombuffer(item["ids"], KEY)
        at = 0
        for table in read_documents(file, columns, rows=rows):
            here = slice(at, at + len(table))
            at += len(table)
            position = np.arange(here.start, here.stop) + item["first"]
            chosen = table.append_column(POSITION, pa.array(position, pa.int64()))
            chosen = chosen.filter(pa.array(hash_ids(chosen["document_id"]) == ids[here]))
            for part in pieces(chosen, chars_per_table):
                waiting.append(part)
                size += part["text"].nbytes
                if size >= chars_per_table:
                    yield pa.concat_tables(waiting)
                    waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def pieces(table: pa.Table, chars: int) -> Iterator[pa.Table]:
    """A table cut between rows into parts that have about `chars` bytes of text each, at least one row."""
    ends = np.cumsum(pc.binary_length(table["text"]).to_numpy())
    start = 0
    while start < len(table):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + chars, side="right")))
        yield table.slice(start, stop - start)
        start = stop
