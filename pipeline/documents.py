"""Documents out of files: Parquet, JSON Lines, plain text and Markdown, streamed as Arrow tables of bounded size.

Only a file that cannot be read at all, or that lacks a column, stops a run: broken UTF-8 becomes U+FFFD, a broken line
becomes a dead row. Ids do not depend on how the files are split over workers.
"""

import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.errors import InputError
from pipeline.columns import (
    COLUMNS,
    DocumentColumns,
    as_text,
    cast_carried,
    document_table,
    is_text,
    join_texts,
    plain_type,
    scrub,
)
from pipeline.packing import look_ahead
from pipeline.storage import SourceFile, filesystem, first_words, is_s3

BYTES_PER_TABLE = 16 << 20
"""A table is closed when its text reaches this, so that memory does not depend on the length of documents."""
BYTES_OF_LINES = 1 << 16
"""A file's lines are as long as those that begin it."""
COMPRESSION = 4
"""Bytes of text in a byte of a compressed file, about."""
AWAY = re.compile(r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|.*HTTP status 5)")
"""What pyarrow says when it is not the file that cannot be read, but the store."""
PAUSES_S = (1, 2, 4, 8, 15)
"""A store that stays away longer ends the run; no document is dead for it."""


def read_documents(
    file: SourceFile,
    columns: DocumentColumns,
    *,
    rows: np.ndarray | None = None,
    rows_per_table: int = 1024,
    with_carried: bool = True,
) -> Iterator[pa.Table]:
    """Read one file from its beginning to its end, or some rows of it.

    Args:
        rows: int64, ascending numbers of the rows that are wanted; the others are left out. Row groups of Parquet
            that hold none of them are not read, lines of JSON not parsed.
        rows_per_table: most rows of a table; it ends earlier when its text reaches `BYTES_PER_TABLE`.
        with_carried: without, the carried columns must be there but are not read.

    Yields:
        Tables with the columns `COLUMNS` and the carried ones, in the order of the file.

    Raises:
        InputError: the file cannot be read, lacks a column (the message names those it has), or has a value in a
            carried column that cannot be cast.
    """
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "text": _read_text}[file.format]
    for table in read(file, columns, rows, rows_per_table, with_carried):
        sizes = pc.binary_length(table["text"]).to_numpy()
        for part in look_ahead(sizes, BYTES_PER_TABLE):
            yield table.slice(part.start, part.stop - part.start)


def check_source(file: SourceFile, columns: DocumentColumns) -> None:
    """Read as much of a file as it takes to know that it has the columns.

    Raises:
        InputError: as `read_documents`.
    """
    document_schema(file, columns)
    if file.format == "jsonl":
        next(_read_jsonl(file, columns, None, 1, False), None)


def document_schema(file: SourceFile, columns: DocumentColumns) -> pa.Schema:
    """The schema of this file's document tables; carried columns have the file's types.

    Raises:
        InputError: as `read_documents`.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns.carry, pa.string())
    if file.format == "parquet":
        schema = _open_parquet(file, columns)[0].schema_arrow
        types = {name: plain_type(schema.field(name).type) for name in columns.carry}
    if columns.carry_types is not None:
        types = dict(zip(columns.carry, columns.carry_types, strict=True))
    return pa.schema([*COLUMNS, *(pa.field(name, types[name]) for name in columns.carry)])


def estimate_documents(file: SourceFile, columns: DocumentColumns) -> int:
    """About how many documents a file holds, from a footer or from its first lines.

    Raises:
        InputError: as `read_documents`.
    """
    if file.format == "parquet":
        return int(_open_parquet(file, columns)[0].metadata.num_rows)
    if file.format == "text":
        return 1
    seen = size = 0
    for _, line in _lines(file):
        seen, size = seen + 1, size + len(line)
        if size >= BYTES_OF_LINES:
            # A compressed file holds several times its size.
            packed = 1 if file.path.lower().endswith(("json", "jsonl")) else COMPRESSION
            return max(seen, file.size * packed * seen // size)
    return seen


# Parquet


def _open_parquet(file: SourceFile, columns: DocumentColumns) -> tuple[pq.ParquetFile, str | None]:
    """The open file, which has the columns, and which of its columns is the id."""
    wanted = columns.text_columns()
    try:
        files, path = filesystem(file.path)
        # A local file is read page by page; from S3 a row group's columns come in few large requests.
        opened = pq.ParquetFile(files.open_input_file(path), buffer_size=1 << 20, pre_buffer=is_s3(file.path))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path} cannot be read as Parquet: {first_words(error)}") from None
    schema = opened.schema_arrow
    automatic = columns.id in (None, "auto")
    id_column = ("id" if "id" in schema.names else None) if automatic else columns.id
    for name in (*wanted, *columns.carry, *([id_column] if id_column else [])):
        if name not in schema.names:
            raise InputError(f"{file.path} has no column {name!r}; it has {', '.join(schema.names)}")
    for name in wanted:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if columns.template is None and not is_text(kind):
            raise InputError(
                f"{file.path}: column {name!r} is {kind}, not text; name another column, or use a template"
            )
    for name, kind in zip(columns.carry, columns.carry_types or (), strict=columns.carry_types is not None):
        cast_carried(pa.nulls(0, plain_type(schema.field(name).type)), kind, name, file)
    return opened, id_column


def _read_parquet(
    file: SourceFile, columns: DocumentColumns, rows: np.ndarray | None, rows_per_table: int, with_carried: bool
) -> Iterator[pa.Table]:
    opened, id_column = _open_parquet(file, columns)
    columns = columns if with_carried else columns.bare()
    names = list(dict.fromkeys([*columns.text_columns(), *columns.carry, *([id_column] if id_column else [])]))
    rows_per_batch = _rows_per_batch(opened, names, rows_per_table)
    meta = opened.metadata
    first = 0
    # One row group after the other: read together from S3 they would all be held in memory at once.
    for group in range(meta.num_row_groups):
        end = first + meta.row_group(group).num_rows
        wanted = None if rows is None else rows[slice(*np.searchsorted(rows, (first, end)))]
        if wanted is None or len(wanted):
            batches = opened.iter_batches(rows_per_batch, row_groups=[group], columns=names, use_threads=False)
            yield from _parquet_tables(file, columns, id_column, batches, first, wanted)
        first = end


def _parquet_tables(
    file: SourceFile,
    columns: DocumentColumns,
    id_column: str | None,
    batches: Iterator[pa.RecordBatch],
    first: int,
    rows: np.ndarray | None,
) -> Iterator[pa.Table]:
    """Document tables of one row group, whose first row has the number `first` in its file."""
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            numbers = np.arange(first, first + len(batch))
            if rows is not None:
                numbers = rows[slice(*np.searchsorted(rows, (first, first + len(batch))))]
            first += len(batch)
            if not len(numbers):
                continue
            if len(numbers) < len(batch):
                batch = batch.take(pa.array(numbers - (first - len(batch))))
            text = join_texts([as_text(batch[name]) for name in columns.text_columns()], columns)
            ids = as_text(batch[id_column]).cast(pa.string()) if id_column else pa.nulls(len(batch), pa.string())
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file.path} cannot be read as Parquet: {first_words(error)}") from None
        carried = {name: batch[name] for name in columns.carry}
        yield document_table(file, columns, numbers, ids, text, pa.nulls(len(batch), pa.string()), carried)


def row_group_sizes(file: SourceFile, columns: DocumentColumns) -> list[tuple[int, int]]:
    """(rows, compressed bytes of the columns that are read) of each row group.

    Raises:
        InputError: as `read_documents`.
    """
    opened, id_column = _open_parquet(file, columns)
    names = {*columns.text_columns(), *([id_column] if id_column else [])}
    sizes = []
    for i in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(i)
        chunks = [group.column(k) for k in range(group.num_columns)]
        size = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)
        sizes.append((group.num_rows, size))
    return sizes


def _rows_per_batch(opened: pq.ParquetFile, names: list[str], rows_per_table: int) -> int:
    """So many rows that a batch of average rows has about BYTES_PER_TABLE."""
    meta = opened.metadata
    size = 0
    for group in range(meta.num_row_groups):
        chunks = (meta.row_group(group).column(i) for i in range(meta.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)
    return max(1, min(rows_per_table, BYTES_PER_TABLE * max(meta.num_rows, 1) // max(size, 1)))


# JSON Lines


def _read_jsonl(
    file: SourceFile, columns: DocumentColumns, wanted: np.ndarray | None, rows_per_table: int, with_carried: bool
) -> Iterator[pa.Table]:
    texts = columns.text_columns()
    id_field = "id" if columns.id in (None, "auto") else columns.id
    required = [*texts, *columns.carry, *([] if columns.id in (None, "auto") else [id_field])]
    columns = columns if with_carried else columns.bare()
    names = dict.fromkeys([*texts, *columns.carry, id_field])
    rows: list[tuple[dict[str, Any], str | None]] = []
    numbers: list[int] = []
    size = at = 0
    seen = False
    for row, (number, line) in enumerate(_lines(file)):
        if wanted is not None:
            if at == len(wanted):
                break
            if row != wanted[at]:
                continue
            at += 1
        value, error = _parse(line, number)
        if error is None and not seen:
            seen = True
            if absent := [name for name in required if name not in value]:
                raise InputError(
                    f"{file.path} has no field {absent[0]!r}; line {number + 1} has {', '.join(value) or 'none'}"
                )
        if error is None and not any(name in value for name in texts):
            error = f"line {number + 1} has no field {texts[0]!r}"
        rows.append(({name: value.get(name) for name in names} if error is None else {}, error))
        numbers.append(row)
        size += len(line)
        if len(rows) >= rows_per_table or size >= BYTES_PER_TABLE:
            yield _json_table(file, numbers, columns, id_field, rows)
            rows, numbers, size = [], [], 0
    if rows:
        yield _json_table(file, numbers, columns, id_field, rows)


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Lines with something on them and their numbers from 0, of a file that may be compressed."""
    files, path = filesystem(file.path)
    try:
        with files.open_input_stream(path, compression="detect") as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20)):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                if line.strip():
                    yield number, line
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path} cannot be read: {first_words(error)}") from None


def _parse(line: bytes, number: int) -> tuple[dict[str, Any], str | None]:
    try:
        value = json.loads(line.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError) as error:
        return {}, f"line {number + 1} is not JSON: {str(error)[:120]}"
    if not isinstance(value, dict):
        return {}, f"line {number + 1} is a JSON {type(value).__name__}, not an object"
    return value, None


def _json_table(
    file: SourceFile,
    numbers: list[int],
    columns: DocumentColumns,
    id_field: str,
    rows: list[tuple[dict[str, Any], str | None]],
) -> pa.Table:
    def column(name: str) -> pa.Array:
        return pa.array([_as_string(row.get(name)) for row, _ in rows], pa.large_string())

    text = join_texts([column(name) for name in columns.text_columns()], columns)
    errors = pa.array([error for _, error in rows], pa.string())
    text = pc.if_else(pc.is_valid(errors), "", text)
    carried = {name: column(name).cast(pa.string()) for name in columns.carry}
    return document_table(file, columns, np.array(numbers), column(id_field).cast(pa.string()), text, errors, carried)


def _as_string(value: Any) -> str | None:
    if value is None:
        return None
    return scrub(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# Text


def _read_text(
    file: SourceFile, columns: DocumentColumns, rows: np.ndarray | None, rows_per_table: int, with_carried: bool
) -> Iterator[pa.Table]:
    if rows is not None and not len(rows):
        return
    columns = columns if with_carried else columns.bare()
    text, error = "", None
    files, path = filesystem(file.path)
    for pause_s in (*PAUSES_S, None):
        try:
            with files.open_input_stream(path, compression="detect") as stream:
                text = _decode(stream.read())
            break
        except (OSError, pa.ArrowException) as failure:
            if not AWAY.search(str(failure)):
                # The file is the document: it is dead, its neighbours are not.
                error = f"cannot be read: {first_words(failure)}"
                break
            if pause_s is None:
                raise InputError(f"{file.path} cannot be read: {first_words(failure)}") from None
            time.sleep(pause_s)
    carried = {name: pa.nulls(1, pa.string()) for name in columns.carry}
    ids = pa.array([scrub(file.relative)], pa.string())
    errors = pa.array([error], pa.string())
    yield document_table(
        file, columns, np.zeros(1, np.int64), ids, pa.array([text], pa.large_string()), errors, carried
    )


def _decode(raw: bytes) -> str:
    """Unicode by its byte order mark, otherwise UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace")
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
