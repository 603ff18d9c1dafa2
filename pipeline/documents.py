"""Documents out of files: Parquet, JSON Lines, plain text and Markdown, streamed as Arrow tables of bounded size.

Only a file that cannot be read at all, or that lacks a column, stops a run: broken UTF-8 becomes U+FFFD, a broken line
becomes a dead row. Ids do not depend on how the files are split over workers.
"""

import hashlib
import io
import itertools
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.errors import InputError
from pipeline.packing import look_ahead
from pipeline.storage import SourceFile, filesystem, first_words, is_s3

BYTES_PER_TABLE = 16 << 20
"""A table is closed when its text reaches this, so that memory does not depend on the length of documents."""

COLUMNS = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""A document table, before the carried columns. `error` says why a row is dead; its text then is empty."""


@dataclass(frozen=True, slots=True)
class DocumentColumns:
    """Which columns of a file make a document. Text files have none: each is one document."""

    id: str | None = "auto"
    """Column with the id; "auto" or None: `id` where there is one. Without: path relative to the source, "#", row."""
    text: str | tuple[str, ...] = "text"
    """Column with the text, or several, joined by a blank line where they are not empty."""
    template: str | None = None
    """Columns put together otherwise, as in "{title}: {body}"; replaces `text`."""
    carry: tuple[str, ...] = ()
    """Columns that are copied to the vectors' rows: Parquet's as they are, JSON's as strings."""

    def text_columns(self) -> tuple[str, ...]:
        """The columns that the text is made of.

        Raises:
            InputError: no column, or a template that is none.
        """
        names = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        if self.template is not None:
            names = tuple(dict.fromkeys(name for _, name in template_parts(self.template) if name is not None))
        if not names:
            raise InputError('no text column is named; give one, or a template with one, as in "{title}\\n\\n{text}"')
        return names


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """(literal, column) pairs; the last column may be None. "{a}: {b}." gives ("", a), (": ", b), (".", None).

    Raises:
        InputError: unbalanced braces, or more than a plain column name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; double a brace that is meant as text") from None
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise InputError(f"template {template!r}: write {{column}} with nothing but a column's name in the braces")
    return [(literal, name) for literal, name, _, _ in parts]


def read_documents(file: SourceFile, columns: DocumentColumns, *, rows_per_table: int = 1024) -> Iterator[pa.Table]:
    """Read one file from its beginning to its end.

    Args:
        rows_per_table: most rows of a table; it ends earlier when its text reaches `BYTES_PER_TABLE`.

    Yields:
        Tables with the columns `COLUMNS` and the carried ones, in the order of the file.

    Raises:
        InputError: the file cannot be read, or lacks a column (the message names those it has).
    """
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "text": _read_text}[file.format]
    for table in read(file, columns, rows_per_table):
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
        next(_read_jsonl(file, columns, 1), None)


def document_schema(file: SourceFile, columns: DocumentColumns) -> pa.Schema:
    """The schema of this file's document tables; carried columns have the file's types.

    Raises:
        InputError: as `read_documents`.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns.carry, pa.string())
    if file.format == "parquet":
        schema = _open_parquet(file, columns)[0].schema_arrow
        types = {name: schema.field(name).type for name in columns.carry}
    return pa.schema([*COLUMNS, *(pa.field(name, types[name]) for name in columns.carry)])


def is_empty(table: pa.Table) -> pa.ChunkedArray:
    """Which rows have nothing but white space for a text; a dead row is not empty but dead."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(table["text"])), 0)
    return pc.and_(blank, pc.is_null(table["error"]))


# Parquet


def _open_parquet(file: SourceFile, columns: DocumentColumns) -> tuple[pq.ParquetFile, list[str], str | None]:
    """The open file, the columns to read, and which of them is the id."""
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
        if columns.template is None and not _is_text(kind):
            raise InputError(
                f"{file.path}: column {name!r} is {kind}, not text; name another column, or use a template"
            )
    return opened, list(dict.fromkeys([*wanted, *columns.carry, *([id_column] if id_column else [])])), id_column


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_null,
        )
    )


def _read_parquet(file: SourceFile, columns: DocumentColumns, rows_per_table: int) -> Iterator[pa.Table]:
    opened, names, id_column = _open_parquet(file, columns)
    rows = _rows_per_batch(opened, names, rows_per_table)
    first = 0
    batches = opened.iter_batches(batch_size=rows, columns=names, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            text = _join([_as_text(batch[name]) for name in columns.text_columns()], columns)
            ids = _as_text(batch[id_column]).cast(pa.string()) if id_column else pa.nulls(len(batch), pa.string())
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file.path} cannot be read as Parquet: {first_words(error)}") from None
        carried = {name: batch[name] for name in columns.carry}
        yield _table(file, first, ids, text, pa.nulls(len(batch), pa.string()), carried)
        first += len(batch)


def _rows_per_batch(opened: pq.ParquetFile, names: list[str], rows_per_table: int) -> int:
    """So many rows that a batch of average rows has about BYTES_PER_TABLE."""
    meta = opened.metadata
    size = 0
    for group in range(meta.num_row_groups):
        chunks = (meta.row_group(group).column(i) for i in range(meta.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)
    return max(1, min(rows_per_table, BYTES_PER_TABLE * max(meta.num_rows, 1) // max(size, 1)))


def _as_text(array: pa.Array) -> pa.Array:
    """Any column as large_string: bytes that are not UTF-8 replaced, numbers written out."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not _is_text(array.type):
        return array.cast(pa.large_string())
    raw = array.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string())  # this cast validates; a file's own "string" may hold anything
    except pa.ArrowInvalid:
        texts = [None if value is None else value.decode("utf-8", "replace") for value in raw.to_pylist()]
        return pa.array(texts, pa.large_string())


def _join(parts: list[pa.Array], columns: DocumentColumns) -> pa.Array:
    """One text a row out of its columns; a missing value counts as an empty one."""
    if columns.template is None:
        filled = [pc.if_else(pc.equal(pc.binary_length(part), 0), None, part) for part in parts]
        blank_line = pa.scalar("\n\n", pa.large_string())
        joined = (
            filled[0] if len(parts) == 1 else pc.binary_join_element_wise(*filled, blank_line, null_handling="skip")
        )
        return pc.fill_null(joined, "")
    by_name = dict(zip(columns.text_columns(), parts, strict=True))
    pieces: list[Any] = []
    for literal, name in template_parts(columns.template):
        pieces += [pa.scalar(literal, pa.large_string())] if literal else []
        pieces += [by_name[name]] if name is not None else []
    separator = pa.scalar("", pa.large_string())
    return pc.binary_join_element_wise(*pieces, separator, null_handling="replace", null_replacement="")


# JSON Lines


def _read_jsonl(file: SourceFile, columns: DocumentColumns, rows_per_table: int) -> Iterator[pa.Table]:
    wanted = columns.text_columns()
    id_field = "id" if columns.id in (None, "auto") else columns.id
    names = dict.fromkeys([*wanted, *columns.carry, id_field])
    rows: list[tuple[dict[str, Any], str | None]] = []
    size = first = 0
    seen = False
    for number, line in _lines(file):
        value, error = _parse(line, number)
        if error is None and not seen:
            seen = True
            required = [*wanted, *columns.carry, *([] if columns.id in (None, "auto") else [id_field])]
            if absent := [name for name in required if name not in value]:
                raise InputError(
                    f"{file.path} has no field {absent[0]!r}; its first line has {', '.join(value) or 'none'}"
                )
        if error is None and not any(name in value for name in wanted):
            error = f"line {number + 1} has no field {wanted[0]!r}"
        rows.append(({name: value.get(name) for name in names} if error is None else {}, error))
        size += len(line)
        if len(rows) >= rows_per_table or size >= BYTES_PER_TABLE:
            yield _json_table(file, first, columns, id_field, rows)
            first, rows, size = number + 1, [], 0
    if rows:
        yield _json_table(file, first, columns, id_field, rows)


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
    file: SourceFile, first: int, columns: DocumentColumns, id_field: str, rows: list[tuple[dict[str, Any], str | None]]
) -> pa.Table:
    def column(name: str) -> pa.Array:
        return pa.array([_as_string(row.get(name)) for row, _ in rows], pa.large_string())

    text = _join([column(name) for name in columns.text_columns()], columns)
    errors = pa.array([error for _, error in rows], pa.string())
    text = pc.if_else(pc.is_valid(errors), "", text)
    carried = {name: column(name).cast(pa.string()) for name in columns.carry}
    return _table(file, first, column(id_field).cast(pa.string()), text, errors, carried)


def _as_string(value: Any) -> str | None:
    if value is None:
        return None
    return scrub(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def scrub(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Text


def _read_text(file: SourceFile, columns: DocumentColumns, rows_per_table: int) -> Iterator[pa.Table]:
    text, error = "", None
    files, path = filesystem(file.path)
    try:
        with files.open_input_stream(path, compression="detect") as stream:
            text = _decode(stream.read())
    except (OSError, pa.ArrowException) as failure:
        # The file is the document: it is dead, its neighbours are not.
        error = f"cannot be read: {first_words(failure)}"
    carried = {name: pa.nulls(1, pa.string()) for name in columns.carry}
    ids = pa.array([scrub(file.relative)], pa.string())
    yield _table(file, 0, ids, pa.array([text], pa.large_string()), pa.array([error], pa.string()), carried)


def _decode(raw: bytes) -> str:
    """Unicode by its byte order mark, otherwise UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace")
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")


def _table(
    file: SourceFile, first: int, ids: pa.Array, text: pa.Array, errors: pa.Array, carried: dict[str, pa.Array]
) -> pa.Table:
    """Put a document table together; rows without an id are named after the file and their number in it."""
    given = pc.fill_null(pc.not_equal(ids, ""), False)
    if not pc.all(given).as_py():
        relative = scrub(file.relative)
        ids = pc.if_else(given, ids, pa.array([f"{relative}#{first + i}" for i in range(len(text))], pa.string()))
    path = pa.array([scrub(file.path)] * len(text), pa.string())
    columns = [ids, text, hash_texts(text), path, errors, *carried.values()]
    schema = pa.schema([*COLUMNS, *(pa.field(name, values.type) for name, values in carried.items())])
    return pa.table(columns, schema=schema)


def hash_texts(text: pa.Array) -> pa.Array:
    """blake2b-128 of each text's UTF-8 bytes, without a copy of them."""
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1].tolist() if offsets else [0]
    raw = memoryview(data) if data is not None else memoryview(b"")
    pairs = itertools.pairwise(bounds)
    digests = b"".join(hashlib.blake2b(raw[start:end], digest_size=16).digest() for start, end in pairs)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(text), [None, pa.py_buffer(digests)])
