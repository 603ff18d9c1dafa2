"""The survey: what a corpus holds against what a table holds, before anything is embedded.

That an id occurs twice can only be seen over the whole corpus, so this is a pass of its own. It is done in partitions
of the id space: every file's documents are dealt out by their ids, every partition is compared by itself, and what is
to be embedded is put together again by file. All of it happens in tasks (`Tasks`); the driver holds references, counts
and the keys of the documents whose rows have to go.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.columns import DocumentColumns
from pipeline.keys import KEY, Keys, is_among
from pipeline.packing import look_ahead
from pipeline.sources import DEAD as UNREADABLE
from pipeline.sources import EMPTY as BLANK
from pipeline.sources import TEXT, FilePart, Holding, Recorded, Records, read_part, read_recorded, record, split_files
from pipeline.storage import SourceFile, is_s3
from pipeline.table import EmbeddingTable
from pipeline.work import CHARS_PER_TABLE, ROW_BITS, Todo, WorkTable, cut_work

NEW, CHANGED, UNCHANGED, EMPTY, DUPLICATE, DEAD = range(6)
STATUS_NAMES = ("new", "changed", "unchanged", "empty", "duplicate", "dead")
URGENT, USUAL, BACKFILL = range(3)
"""In this order: readers see outdated vectors of what changed, none of what is new, and good ones of another recipe
of what only has to be embedded again."""

BYTES_PER_GROUP = 16_000_000
"""Source files that one task surveys."""
BYTES_PER_PARTITION = 8_000_000_000
"""Of the source; a partition's task takes about 200 bytes of memory for each document."""
ROWS_PER_KEYS = 1_000_000
"""Rows of the table whose keys one task reads."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of some files, in any order: 45 bytes each."""

    places: np.ndarray
    """int64: file number << ROW_BITS | row."""
    ids: np.ndarray
    hashes: np.ndarray
    chars: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, holdings: Sequence[Holding]) -> "Documents":
        places = [np.arange(len(h.ids)) + ((h.number << ROW_BITS) + h.first_row) for h in holdings]
        return cls(
            np.concatenate([np.empty(0, np.int64), *places]),
            np.concatenate([np.empty(0, KEY), *(h.ids for h in holdings)]),
            np.concatenate([np.empty(0, KEY), *(h.hashes for h in holdings)]),
            np.concatenate([np.empty(0, np.int32), *(h.chars for h in holdings)]),
            np.concatenate([np.empty(0, np.uint8), *(h.kinds for h in holdings)]),
        )

    def take(self, at: np.ndarray) -> "Documents":
        return Documents(self.places[at], self.ids[at], self.hashes[at], self.chars[at], self.kinds[at])


@dataclass(frozen=True, slots=True)
class Options:
    """What decides a plan beside the corpus and the table."""

    delete_missing: bool = False
    letters: Keys = field(default_factory=Keys.empty)
    """Documents that failed, and the text they failed with: they count as dead and are left alone."""
    backfill: Keys = field(default_factory=Keys.empty)
    """Documents that readers have vectors of, under another recipe: they can wait."""
    num_partitions: int = 1
    ranges: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    """int64: the listing is cut at these file numbers when work is put together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one partition came to."""

    counts: np.ndarray
    """int64, one for each status."""
    amounts: np.ndarray
    """int64 (urgencies, ranges, 2): documents to embed and their bytes, by urgency and range of files."""
    removals: Keys
    deleted: np.ndarray
    buried: np.ndarray
    seen: np.ndarray
    held: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do."""

    counts: dict[str, int]
    """Documents read, by what they are; the values of STATUS_NAMES add up to `read`."""
    work: list[WorkTable]
    """What is to be embedded, the most urgent first; positions count through it."""
    removals: Keys
    """Of documents in the table whose rows go: when their new ones come, or because they are `deleted`."""
    deleted: np.ndarray
    """S16, sorted: documents in the table that are to be removed: vanished (where asked for), or empty by now."""
    dead: list[dict[str, str]]
    """id, source, stage and error of the rows that could not be read."""
    buried: np.ndarray = field(default_factory=lambda: np.empty(0, KEY))
    """S16, sorted: documents that are left alone because they failed before, with this very text."""
    seen: np.ndarray = field(default_factory=lambda: np.empty(0, KEY))
    """S16, sorted: documents that failed before, and are there, with whatever text."""
    held: int = 0
    """Documents that the table held before."""

    @property
    def num_documents(self) -> int:
        """Documents to embed."""
        return sum(work.documents for work in self.work)

    @property
    def chars(self) -> int:
        """Bytes of text to embed."""
        return sum(work.chars for work in self.work)


class Tasks:
    """Where the survey's steps run: here, at once."""

    def put(self, value: Any) -> Any:
        """Something that several steps get."""
        return value

    def call(self, step: Callable[..., Any], *arguments: Any, results: int) -> list[Any]:
        """The results of a step, or references to them, which other steps take as arguments."""
        return list(step(*arguments))

    def stream(self, step: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """What a step yields, or references to it."""
        return step(*arguments)

    def get(self, reference: Any) -> Any:
        return reference


class RayTasks(Tasks):
    """The same in Ray tasks. A reference stands for a value that may never come to this process."""

    def __init__(self) -> None:
        self.steps: dict[Callable[..., Any], Any] = {}

    def remote(self, step: Callable[..., Any]) -> Any:
        """The step as Ray knows it; each is sent to the cluster once."""
        import ray

        if step not in self.steps:
            self.steps[step] = ray.remote(step)
        return self.steps[step]

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def call(self, step: Callable[..., Any], *arguments: Any, results: int) -> list[Any]:
        found = self.remote(step).options(num_returns=results).remote(*arguments)
        return found if isinstance(found, list) else [found]

    def stream(self, step: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        return self.remote(step).options(num_returns="streaming").remote(*arguments)

    def get(self, reference: Any) -> Any:
        import ray

        return ray.get(reference)


def make_plan(
    files: Sequence[SourceFile],
    columns: DocumentColumns,
    uri: str,
    table: EmbeddingTable | None,
    options: Options,
    tasks: Tasks,
    *,
    least_chars: int,
    keep: bool,
) -> Plan:
    """Compare the files of a source with a table.

    Args:
        files: sorted; of documents with the same id the first counts.
        uri: of the table, which does not exist before the first run.
        least_chars: bytes of text that a table of work has at least, unless there is no more.
        keep: whether to record beside the table what files hold.

    Raises:
        InputError: a file that cannot be read, a column that is missing.
    """
    uri = uri if is_s3(uri) else os.path.abspath(os.path.expanduser(uri))  # workers have another working directory
    records = Records(uri, files, columns)
    ends = np.cumsum([0, *(file.size for file in files)])
    num_partitions = int(min(max(ends[-1] // BYTES_PER_PARTITION, 1), 256))
    cuts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], BYTES_PER_PARTITION), side="left"))
    ranges = np.append(cuts, len(files))
    options = replace(options, num_partitions=max(options.num_partitions, num_partitions), ranges=ranges)
    num_partitions = options.num_partitions

    groups = [*records.found, *grouped(split_files(records.unknown, columns))]
    shared = tasks.put(columns)
    surveys = [
        tasks.call(survey_files, group, shared, uri, keep, num_partitions, results=num_partitions + 1)
        for group in groups
    ]
    held = []
    if table is not None:
        held = [
            tasks.call(survey_table, table.uri, table.version, some, num_partitions, results=num_partitions + 1)
            for some in table.fragment_groups(ROWS_PER_KEYS)
        ]
    dead = [{**row, "stage": "read"} for survey in surveys for row in tasks.get(survey[0])]
    shared = tasks.put(options)
    compared = [
        tasks.call(compare, shared, i, len(surveys), *(s[i + 1] for s in surveys), *(h[i + 1] for h in held), results=2)
        for i in range(num_partitions)
    ]
    del surveys, held
    outcomes = [tasks.get(outcome) for outcome, _ in compared]
    todos = [todo for _, todo in compared]
    amounts = sum((outcome.amounts for outcome in outcomes), start=np.zeros_like(outcomes[0].amounts))
    chars_per_table = max(least_chars, min(CHARS_PER_TABLE, int(amounts[:, :, 1].sum()) // 8))
    streams, position = [], 0
    for urgency, here in np.argwhere(amounts[:, :, 0]).tolist():
        low, high = ranges[here : here + 2].tolist()
        streams.append(tasks.stream(cut_work, files[low:high], low, position, urgency, chars_per_table, *todos))
        position += int(amounts[urgency, here, 0])
    work = [WorkTable(next(stream), *tasks.get(about)) for stream in streams for about in stream]
    counts = sum((outcome.counts for outcome in outcomes), start=np.zeros_like(outcomes[0].counts)).tolist()
    if keep:
        records.tidy()
    return Plan(
        {"read": sum(counts), **dict(zip(STATUS_NAMES, counts, strict=True))},
        work,
        Keys.join([outcome.removals for outcome in outcomes]),
        np.concatenate([outcome.deleted for outcome in outcomes]),
        dead,
        np.concatenate([outcome.buried for outcome in outcomes]),
        np.concatenate([outcome.seen for outcome in outcomes]),
        sum(outcome.held for outcome in outcomes),
    )


def grouped(parts: Sequence[FilePart]) -> Iterator[list[FilePart]]:
    """Files for one task each time, in their order."""
    for some in look_ahead(np.array([part.size for part in parts], np.int64), BYTES_PER_GROUP):
        yield list(parts[some])


def survey_files(
    group: Sequence[FilePart] | Recorded, columns: DocumentColumns, uri: str, keep: bool, num_partitions: int
) -> Iterator[Any]:
    """Step: the dead rows of some files, and then their documents by partition.

    Args:
        group: files to read, or records of files.
        uri: the table that the records lie beside.
        keep: whether to record what was read.
    """
    if isinstance(group, Recorded):
        holdings = list(read_recorded(uri, group, columns))
    else:
        begun_ns = time.time_ns()
        holdings = [read_part(part, columns) for part in group]
        if keep:
            record(uri, group, holdings, columns, begun_ns)
    documents = Documents.of(holdings)
    yield [row for holding in holdings for row in holding.dead]
    partition = partitions_of(documents.ids, num_partitions)
    for number in range(num_partitions):
        yield documents.take(np.flatnonzero(partition == number)) if num_partitions > 1 else documents


def partitions_of(ids: np.ndarray, num_partitions: int) -> np.ndarray:
    """Which partition each id belongs to: ranges of its first byte, at most 256 of them."""
    return ids.view(np.uint8).reshape(-1, KEY.itemsize)[:, 0].astype(np.int64) * num_partitions >> 8


def survey_table(uri: str, version: int, fragments: Sequence[int], num_partitions: int) -> Iterator[Any]:
    """Step: how many keys some fragments of a table have, and then the keys by partition."""
    keys = EmbeddingTable.open(uri, version).keys(fragments)
    yield len(keys.ids)
    partition = partitions_of(keys.ids, num_partitions)
    for number in range(num_partitions):
        yield keys.take(np.flatnonzero(partition == number)) if num_partitions > 1 else keys


def compare(options: Options, number: int, num_surveys: int, *arrived: Any) -> Iterator[Any]:
    """Step: one partition of the corpus against that of the table; yields the outcome, and what is to be embedded.

    Of several documents with one id the first that can be read and is not empty counts; the others are duplicates.

    Args:
        number: of the partition.
        arrived: the partition's part of every survey of files, and after `num_surveys` of them of every survey of the
            table.
    """
    documents: list[Documents] = list(arrived[:num_surveys])
    keys = Keys.join(arrived[num_surveys:])
    places = np.concatenate([np.empty(0, np.int64), *(part.places for part in documents)])
    ids = np.concatenate([np.empty(0, KEY), *(part.ids for part in documents)])
    hashes = np.concatenate([np.empty(0, KEY), *(part.hashes for part in documents)])
    chars = np.concatenate([np.empty(0, np.int32), *(part.chars for part in documents)])
    kinds = np.concatenate([np.empty(0, np.uint8), *(part.kinds for part in documents)])
    del documents, arrived

    usable = np.flatnonzero(kinds == TEXT)
    high, low = halves(ids[usable])
    usable = usable[np.lexsort((places[usable], low, high))]
    starts = np.ones(len(usable), dtype=bool)
    starts[1:] = ids[usable[1:]] != ids[usable[:-1]]
    first = usable[starts]
    claimed = ids[first]

    status = np.full(len(ids), DUPLICATE, np.uint8)
    status[kinds == BLANK] = EMPTY
    status[kinds == UNREADABLE] = DEAD
    status[first] = np.where(keys.known(claimed), CHANGED, NEW)
    letters = options.letters
    buried = first[letters.unchanged(claimed, hashes[first])]
    status[buried] = DEAD
    unchanged = first[keys.unchanged(claimed, hashes[first])]
    status[unchanged] = UNCHANGED

    emptied = np.unique(ids[kinds == BLANK])
    deleted = emptied[keys.known(emptied) & ~is_among(emptied, claimed)]
    seen = np.unique(ids)
    if options.delete_missing:
        held = np.unique(keys.ids)
        # A dead document stays: that it cannot be read today does not mean that it is gone.
        deleted = np.union1d(deleted, held[~is_among(held, seen)])

    todo = np.flatnonzero((status == NEW) | (status == CHANGED))
    todo = todo[np.argsort(places[todo])]
    urgency = np.where(status[todo] == CHANGED, URGENT, USUAL).astype(np.uint8)
    if len(options.backfill.ids):
        urgency[options.backfill.unchanged(ids[todo], hashes[todo])] = BACKFILL
    work = Todo(places[todo], ids[todo], chars[todo], urgency)
    amounts = np.zeros((BACKFILL + 1, len(options.ranges) - 1, 2), np.int64)
    of_range = np.searchsorted(options.ranges, places[todo] >> ROW_BITS, side="right") - 1
    np.add.at(amounts[:, :, 0], (urgency, of_range), 1)
    np.add.at(amounts[:, :, 1], (urgency, of_range), chars[todo])
    replaced = np.union1d(ids[status == CHANGED], deleted)
    outcome = Outcome(
        np.bincount(status, minlength=len(STATUS_NAMES)),
        amounts,
        keys.take(np.flatnonzero(is_among(keys.ids, replaced))),
        deleted,
        np.sort(ids[buried]),
        np.sort(letters.ids[is_among(letters.ids, seen)]),
        len(np.unique(keys.ids)),
    )
    yield outcome
    yield work


def halves(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids as two columns of uint64 that sort as they do, several times faster."""
    both = ids.view(">u8").reshape(-1, 2).astype(np.uint64)
    return both[:, 0], both[:, 1]
