"""What source files hold, read once and remembered beside the table: a file that did not change is not read again.

A record belongs to a file as it was listed (path, size, change time, ETag) and to the settings it was read with. It
says nothing about the table: what is new or changed comes, in every run, from comparing with the table as it is. So a
record cannot run ahead of the table, whatever crashed or was rolled back, and is written as soon as a file was read.
"""

import hashlib
import itertools
import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.columns import DocumentColumns, is_empty
from pipeline.documents import read_documents, row_group_sizes
from pipeline.keys import KEY, as_keys, hash_ids, is_among
from pipeline.storage import SourceFile, filesystem

log = logging.getLogger(__name__)

FOLDER = "_sources"
"""Folder in the table with the records: Parquet files, each written once."""
TEXT, EMPTY, DEAD = range(3)
READER_VERSION = 1
"""Raised when a change of this code makes other ids or texts out of the same file."""
RACY_NS = 2_000_000_000
"""A file that changed less than this before it was read is not recorded: another change within the same tick of the
file system's clock (up to 2 s) would leave no trace. git calls such entries racy."""
PART_BYTES = 64_000_000
"""Larger Parquet files are surveyed in parts of whole row groups."""
GROUP_BYTES = 8_000_000
"""Records that one task takes at once."""
MOST_FRAGMENTED = 16
"""So many small or outdated files of records are left alone; more are merged."""

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("part", pa.int32()),
        ("parts", pa.int32()),
        ("first_row", pa.int64()),
        ("documents", pa.int64()),
        ("ids", pa.large_binary()),
        ("hashes", pa.large_binary()),
        ("chars", pa.large_binary()),
        ("kinds", pa.large_binary()),
        ("dead", pa.large_string()),
    ]
)
INDEX = ["key", "part", "parts", "first_row", "documents"]
"""The columns that tell what is recorded; the others are the documents, 37 bytes each."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A source file, or the rows [first_row, stop_row) of one."""

    file: SourceFile
    number: int
    """Of the file in the sorted listing."""
    part: int = 0
    parts: int = 1
    first_row: int = 0
    stop_row: int | None = None
    size: int = 0
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Holding:
    """The documents of a file, or of a part of one, in their order."""

    number: int
    first_row: int
    ids: np.ndarray
    """S16, hashes of the ids."""
    hashes: np.ndarray
    """S16, hashes of the texts."""
    chars: np.ndarray
    """int32, bytes of text, which is what work is measured by."""
    kinds: np.ndarray
    """uint8: TEXT, EMPTY or DEAD."""
    dead: list[dict[str, str]]
    """document_id, source and error of the rows that could not be read."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Records that lie together: rows of one row group of one file of records."""

    path: str
    group: int
    rows: np.ndarray
    """int64, in the row group."""
    files: list[tuple[int, SourceFile]]
    """Number and file that each row describes."""


def reading_key(columns: DocumentColumns) -> str:
    """What decides, beside the file, which ids and texts come out of it."""
    return json.dumps([READER_VERSION, PART_BYTES, columns.id or "auto", columns.text_columns(), columns.template])


def file_keys(files: Sequence[SourceFile], columns: DocumentColumns) -> np.ndarray:
    """S16 for each file: as it is and as it is read."""
    reading = reading_key(columns).encode()
    digests = (
        hashlib.blake2b(
            repr((file.path, file.relative, file.size, file.mtime_ns, file.etag)).encode("utf-8", "surrogateescape"),
            digest_size=16,
            key=hashlib.blake2b(reading, digest_size=32).digest(),
        ).digest()
        for file in files
    )
    return np.frombuffer(b"".join(digests), dtype=KEY)


def split_files(files: Iterable[tuple[int, SourceFile]], columns: DocumentColumns) -> list[FilePart]:
    """Whole files, and large Parquet files in parts of about PART_BYTES. Reads the footers of those.

    Raises:
        InputError: a large file cannot be read as Parquet, or lacks a column.
    """

    def split(item: tuple[int, SourceFile]) -> list[FilePart]:
        number, file = item
        if file.format != "parquet" or file.size <= PART_BYTES:
            return [FilePart(file, number, size=file.size)]
        sizes = row_group_sizes(file, columns)
        ends, cuts, waiting = np.cumsum([rows for rows, _ in sizes]).tolist(), [0], 0
        for end, (_, size) in zip(ends, sizes, strict=True):
            waiting += size
            if waiting >= PART_BYTES or end == ends[-1]:
                cuts.append(end)
                waiting = 0
        bounds = list(itertools.pairwise(cuts))
        size = file.size // max(len(bounds), 1)
        return [FilePart(file, number, i, len(bounds), low, high, size) for i, (low, high) in enumerate(bounds)]

    with ThreadPoolExecutor(16) as threads:
        return [part for parts in threads.map(split, files) for part in parts]


def read_part(part: FilePart, columns: DocumentColumns) -> Holding:
    """Read the ids of documents, and hash their texts.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    rows = None if part.stop_row is None else np.arange(part.first_row, part.stop_row)
    ids, hashes, chars, kinds = [], [], [], []
    dead: list[dict[str, str]] = []
    for table in read_documents(part.file, columns, rows=rows, with_carried=False):
        kind = np.full(len(table), TEXT, np.uint8)
        kind[is_empty(table).to_numpy(zero_copy_only=False)] = EMPTY
        failed = pc.is_valid(table["error"])
        kind[failed.to_numpy()] = DEAD
        dead += table.filter(failed).select(["document_id", "source", "error"]).to_pylist()
        ids.append(hash_ids(table["document_id"]))
        hashes.append(as_keys(table["text_hash"]))
        kinds.append(kind)
        chars.append(np.minimum(pc.binary_length(table["text"]).to_numpy(), np.iinfo(np.int32).max).astype(np.int32))
    return Holding(
        part.number,
        part.first_row,
        np.concatenate([np.empty(0, KEY), *ids]),
        np.concatenate([np.empty(0, KEY), *hashes]),
        np.concatenate([np.empty(0, np.int32), *chars]),
        np.concatenate([np.empty(0, np.uint8), *kinds]),
        dead,
    )


class Records:
    """The records beside one table, matched with a listing of the source.

    Args:
        uri: the table.
        files: the listing; a record counts only if its file is among them as it was then.
    """

    def __init__(self, uri: str, files: Sequence[SourceFile], columns: DocumentColumns) -> None:
        self.uri, self.files, self.columns = uri, files, columns
        keys = file_keys(files, columns)
        order = np.argsort(keys)
        self.ordered, self.numbers = keys[order], order
        self.shards: list[tuple[str, int, int, int]] = []
        """Path, bytes, records and, of them, those in use."""
        self.found: list[Recorded] = []
        index = [part for info in shards_of(uri) for part in self._index(info)]
        numbers, part, parts = (
            np.concatenate([np.empty(0, np.int64), *(table[name].to_numpy() for _, _, table in index)])
            for name in ("number", "part", "parts")
        )
        # A part that was recorded twice counts once; a file of which a part is missing is read again.
        first = np.unique(numbers << 32 | part, return_index=True)[1]
        whole = np.bincount(numbers[first], minlength=len(files)) > 0
        whole[numbers[first]] = np.bincount(numbers[first], minlength=len(files))[numbers[first]] == parts[first]
        chosen = np.zeros(len(numbers), dtype=bool)
        chosen[first] = whole[numbers[first]]
        end = 0
        for path, group, table in index:
            start, end = end, end + len(table)
            here = np.flatnonzero(chosen[start:end])
            if len(here):
                described = [(number, files[number]) for number in numbers[start:end][here].tolist()]
                self.found.append(Recorded(path, group, table["row"].to_numpy()[here], described))
        self.unknown = [(number, files[number]) for number in np.flatnonzero(~whole).tolist()]
        """Number and file of those that have to be read."""

    def _index(self, info: pafs.FileInfo) -> Iterator[tuple[str, int, pa.Table]]:
        """Of each row group the records in use: number of the file, row, part, parts."""
        files, _ = filesystem(self.uri)
        used = total = 0
        try:
            opened = pq.ParquetFile(files.open_input_file(info.path))
            for group in range(opened.metadata.num_row_groups):
                table = opened.read_row_group(group, columns=INDEX)
                keys = as_keys(table["key"])
                rows = np.flatnonzero(is_among(keys, self.ordered))
                total, used = total + len(table), used + len(rows)
                numbers = self.numbers[np.searchsorted(self.ordered, keys[rows])]
                chosen = table.select(["part", "parts"]).take(pa.array(rows, pa.int64()))
                chosen = chosen.append_column("number", pa.array(numbers)).append_column("row", pa.array(rows))
                yield info.path, group, chosen
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read and is left out, its files are read again: %s", info.path, error)
        self.shards.append((info.path, info.size or 0, total, used))

    def tidy(self) -> None:
        """Merge small and outdated files of records, once there are many; records of files that are gone are dropped.

        A crash on the way leaves records that stand in two files, which does no harm.
        """
        worn = [shard for shard in self.shards if shard[1] < GROUP_BYTES or shard[3] * 2 < shard[2]]
        if len(worn) <= MOST_FRAGMENTED:
            return
        files, _ = filesystem(self.uri)
        paths = {shard[0] for shard in worn}
        kept = (read_rows(files, item) for item in self.found if item.path in paths)
        write_shard(self.uri, (table for table in kept if len(table)))
        for path in sorted(paths):
            try:
                files.delete_file(path)
            except FileNotFoundError:
                continue


def shards_of(uri: str) -> list[pafs.FileInfo]:
    files, path = filesystem(uri)
    selector = pafs.FileSelector(f"{path.rstrip('/')}/{FOLDER}", allow_not_found=True)
    found = [info for info in files.get_file_info(selector) if info.path.endswith(".parquet")]
    return sorted(found, key=lambda info: str(info.path))


def read_rows(files: pafs.FileSystem, item: Recorded) -> pa.Table:
    opened = pq.ParquetFile(files.open_input_file(item.path))
    return opened.read_row_group(item.group).take(pa.array(item.rows))


def read_recorded(uri: str, item: Recorded, columns: DocumentColumns) -> Iterator[Holding]:
    """What the records say; files whose records cannot be read any more are read themselves."""
    try:
        table = read_rows(filesystem(uri)[0], item)
    except (OSError, pa.ArrowException) as error:
        log.warning("%s cannot be read, its files are read again: %s", item.path, error)
        for part in split_files(dict(item.files).items(), columns):
            yield read_part(part, columns)
        return
    for (number, _), row in zip(item.files, range(len(table)), strict=True):
        ids, hashes, chars, kinds = (table[name][row].as_buffer() for name in ("ids", "hashes", "chars", "kinds"))
        yield Holding(
            number,
            table["first_row"][row].as_py(),
            np.frombuffer(ids, KEY),
            np.frombuffer(hashes, KEY),
            np.frombuffer(chars, np.int32),
            np.frombuffer(kinds, np.uint8),
            json.loads(table["dead"][row].as_py()),
        )


def record(
    uri: str, parts: Sequence[FilePart], holdings: Sequence[Holding], columns: DocumentColumns, begun_ns: int
) -> None:
    """Remember what was read from files, if they had been at rest when it began.

    Args:
        begun_ns: when the first of them began to be read, on the clock that stamps files.
    """
    keys = file_keys([part.file for part in parts], columns)

    def rows() -> Iterator[dict[str, object]]:
        for key, part, held in zip(keys.tolist(), parts, holdings, strict=True):
            at_rest = part.file.mtime_ns + RACY_NS < begun_ns
            # A text file that could not be read may be readable tomorrow, without having changed.
            tried = not (part.file.format == "text" and held.dead)
            if at_rest and tried and held.ids.nbytes < 2**30:
                arrays = {"ids": held.ids, "hashes": held.hashes, "chars": held.chars, "kinds": held.kinds}
                yield {
                    "key": key.ljust(KEY.itemsize, b"\0"),
                    "part": part.part,
                    "parts": part.parts,
                    "first_row": part.first_row,
                    "documents": len(held.ids),
                    **{name: values.tobytes() for name, values in arrays.items()},
                    "dead": json.dumps(held.dead),
                }

    write_shard(uri, (pa.Table.from_pylist([row], schema=SCHEMA) for row in rows()))


def write_shard(uri: str, tables: Iterable[pa.Table]) -> None:
    """Write one file of records, whole or not at all, in row groups of about GROUP_BYTES."""
    files, path = filesystem(uri)
    target = f"{path.rstrip('/')}/{FOLDER}/{uuid.uuid4().hex}.parquet"
    local = isinstance(files, pafs.LocalFileSystem)
    waiting: list[pa.Table] = []
    size = 0
    writer: pq.ParquetWriter | None = None
    if local:
        files.create_dir(f"{path}/{FOLDER}", recursive=True)
    # An object appears when it is complete; a local file gets its name then.
    staging = f"{target}.part" if local else target

    def flush() -> None:
        nonlocal writer, size
        if writer is None:
            writer = pq.ParquetWriter(staging, SCHEMA, filesystem=files, compression="zstd", use_dictionary=False)
        writer.write_table(pa.concat_tables(waiting), row_group_size=1 << 30)
        waiting.clear()
        size = 0

    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size >= GROUP_BYTES:
            flush()
    if waiting:
        flush()
    if writer is not None:
        writer.close()
        if local:
            files.move(staging, target)
