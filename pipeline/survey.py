"""The survey: what a corpus holds against what a table holds, before anything is embedded.

Every file is read once for ids and hashes only (`survey_file`, on any worker). Text never reaches the driver, which
puts the hashes together (`make_plan`). That an id occurs twice can only be seen over the whole corpus: so this is a
pass of its own, and it says how much work there is before the first encoder is started.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import DocumentColumns, is_empty
from pipeline.documents import read_documents
from pipeline.storage import SourceFile
from pipeline.table import KEY, Keys, as_keys, hash_ids, is_among

NEW, CHANGED, UNCHANGED, EMPTY, DUPLICATE, DEAD = range(6)
STATUS_NAMES = ("new", "changed", "unchanged", "empty", "duplicate", "dead")


@dataclass(frozen=True, slots=True)
class FileSurvey:
    """One file's documents in their order: 21 bytes each."""

    file: SourceFile
    ids: np.ndarray
    """S16, hashes of the ids."""
    status: np.ndarray
    """uint8, one of NEW, CHANGED, UNCHANGED, EMPTY, DEAD; duplicates are not known yet."""
    chars: np.ndarray
    """int32, bytes of text, which is what work is measured by."""
    dead: list[dict[str, str]]
    """id, source and error of the rows that could not be read."""


def survey_file(file: SourceFile, columns: DocumentColumns, keys: Keys) -> FileSurvey:
    """Compare the documents of a file with a table."""
    ids, status, chars = [], [], []
    dead: list[dict[str, str]] = []
    for table in read_documents(file, columns):
        hashed = hash_ids(table["document_id"])
        hashes = as_keys(table["text_hash"])
        kind = np.where(keys.known(hashed), CHANGED, NEW).astype(np.uint8)
        kind[keys.unchanged(hashed, hashes)] = UNCHANGED
        kind[is_empty(table).to_numpy(zero_copy_only=False)] = EMPTY
        failed = pc.is_valid(table["error"])
        kind[failed.to_numpy()] = DEAD
        dead += table.filter(failed).select(["document_id", "source", "error"]).to_pylist()
        ids.append(hashed)
        status.append(kind)
        chars.append(np.minimum(pc.binary_length(table["text"]).to_numpy(), np.iinfo(np.int32).max).astype(np.int32))
    if not ids:
        return FileSurvey(file, np.empty(0, KEY), np.empty(0, np.uint8), np.empty(0, np.int32), dead)
    return FileSurvey(file, np.concatenate(ids), np.concatenate(status), np.concatenate(chars), dead)


@dataclass(frozen=True, slots=True)
class FileWork:
    """The documents of one file that are to be embedded."""

    file: SourceFile
    rows: np.ndarray
    """int64, their row numbers, ascending."""
    ids: np.ndarray
    """S16, the hashes of their ids, in the same order."""
    chars: int
    """Bytes of their text."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do."""

    counts: dict[str, int]
    """Documents read, by what they are; the values of STATUS_NAMES add up to `read`."""
    work: list[FileWork]
    replaced: np.ndarray
    """S16, sorted: documents in the table whose rows go when their new ones come."""
    deleted: np.ndarray
    """S16, sorted: documents in the table that are to be removed: vanished (where asked for), or empty by now."""
    dead: list[dict[str, str]]
    """id, source, stage and error of the rows that could not be read."""
    embedded: np.ndarray = field(init=False)
    """S16, sorted: every document that is to be embedded."""

    def __post_init__(self) -> None:
        ids = [work.ids for work in self.work]
        object.__setattr__(self, "embedded", np.sort(np.concatenate(ids)) if ids else np.empty(0, KEY))

    @property
    def chars(self) -> int:
        """Bytes of text to embed."""
        return sum(work.chars for work in self.work)


def make_plan(surveys: Sequence[FileSurvey], keys: Keys, *, delete_missing: bool) -> Plan:
    """Put the surveys of all files, in the order of the source, together.

    Of several documents with one id the first that can be read and is not empty counts; the others are duplicates.
    """
    lengths = [len(survey.ids) for survey in surveys]
    ids = np.concatenate([np.empty(0, KEY), *(survey.ids for survey in surveys)])
    status = np.concatenate([np.empty(0, np.uint8), *(survey.status for survey in surveys)])
    usable = np.flatnonzero((status != EMPTY) & (status != DEAD))
    # np.unique's first occurrence is the first in the order of the source: its sort is stable.
    first = usable[np.unique(ids[usable], return_index=True)[1]]
    repeated = np.ones(len(ids), dtype=bool)
    repeated[first] = False
    status[repeated & (status != EMPTY) & (status != DEAD)] = DUPLICATE
    work = []
    for survey, end in zip(surveys, np.cumsum(lengths), strict=True):
        part = status[end - len(survey.ids) : end]
        rows = np.flatnonzero((part == NEW) | (part == CHANGED))
        if len(rows):
            work.append(FileWork(survey.file, rows, survey.ids[rows], int(survey.chars[rows].sum(dtype=np.int64))))
    claimed = np.sort(ids[first])
    emptied = np.unique(ids[status == EMPTY])
    gone = emptied[keys.known(emptied) & ~is_among(emptied, claimed)]
    if delete_missing:
        held = np.unique(keys.ids)
        # A dead document stays: that it cannot be read today does not mean that it is gone.
        gone = np.union1d(gone, held[~is_among(held, np.unique(ids))])
    dead = [{**row, "stage": "read"} for survey in surveys for row in survey.dead]
    counts = {name: int((status == code).sum()) for code, name in enumerate(STATUS_NAMES)}
    return Plan({"read": len(ids), **counts}, work, np.sort(ids[status == CHANGED]), gone, dead)


WORK_SCHEMA = pa.schema(
    [("file", pa.string()), ("rows", pa.large_binary()), ("ids", pa.large_binary()), ("chars", pa.int64())]
)


def work_tables(work: Sequence[FileWork], chars_per_table: int) -> list[pa.Table]:
    """The work as small Arrow tables, one for each task that reads: files go together up to a number of characters."""
    tables: list[pa.Table] = []
    waiting: list[dict[str, object]] = []
    size = 0
    for item in work:
        waiting.append(
            {
                "file": json.dumps(asdict(item.file)),
                "rows": item.rows.astype(np.int64).tobytes(),
                "ids": item.ids.tobytes(),
                "chars": item.chars,
            }
        )
        size += item.chars
        if size >= chars_per_table:
            tables.append(pa.Table.from_pylist(waiting, schema=WORK_SCHEMA))
            waiting, size = [], 0
    if waiting:
        tables.append(pa.Table.from_pylist(waiting, schema=WORK_SCHEMA))
    return tables


def read_work(items: pa.Table, columns: DocumentColumns, chars_per_table: int) -> Iterator[pa.Table]:
    """Read the documents that a plan chose, in tables of about `chars_per_table` bytes of text.

    A row whose id is not the surveyed one any more (the file changed since) is left out; the run counts it as dead and
    the next one takes it.
    """
    waiting: list[pa.Table] = []
    size = 0
    for item in items.to_pylist():
        file = SourceFile(**json.loads(item["file"]))
        rows, ids = np.frombuffer(item["rows"], np.int64), np.frombuffer(item["ids"], KEY)
        start = 0
        for table in read_documents(file, columns):
            here = slice(*np.searchsorted(rows, (start, start + len(table))))
            chosen = table.take(pa.array(rows[here] - start))
            start += len(table)
            if len(chosen):
                chosen = chosen.filter(pa.array(hash_ids(chosen["document_id"]) == ids[here]))
            for part in pieces(chosen, chars_per_table):
                waiting.append(part)
                size += part["text"].nbytes
                if size >= chars_per_table:
                    yield pa.concat_tables(waiting)
                    waiting, size = [], 0
            if start > (rows[-1] if len(rows) else -1):
                break
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
