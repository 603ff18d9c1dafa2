"""What makes a document: which columns hold its id and text, how texts are put together, and the document table.

`pipeline.documents` reads files with it. Broken UTF-8 becomes U+FFFD here, and a carried column gets the one type that
the table has for it.
"""

import hashlib
import itertools
import string
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.errors import InputError
from pipeline.storage import SourceFile, first_words

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
    """Columns that are copied to the vectors' rows."""
    carry_types: tuple[pa.DataType, ...] | None = None
    """What `carry` is cast to: a table has one type for a column, files may have several. None leaves Parquet's types
    as they are and takes JSON's values as strings."""

    def bare(self) -> "DocumentColumns":
        """The same without the carried columns."""
        return replace(self, carry=(), carry_types=None)

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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that a carried column gets in a table: without a dictionary, and text where the file has only nulls."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_null(kind) or pa.types.is_string_view(kind) else kind


def is_empty(table: pa.Table) -> pa.ChunkedArray:
    """Which rows have nothing but white space for a text; a dead row is not empty but dead."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(table["text"])), 0)
    return pc.and_(blank, pc.is_null(table["error"]))


def is_text(kind: pa.DataType) -> bool:
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


def as_text(array: pa.Array) -> pa.Array:
    """Any column as large_string: bytes that are not UTF-8 replaced, numbers written out."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not is_text(array.type):
        return array.cast(pa.large_string())
    raw = array.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string())  # this cast validates; a file's own "string" may hold anything
    except pa.ArrowInvalid:
        texts = [None if value is None else value.decode("utf-8", "replace") for value in raw.to_pylist()]
        return pa.array(texts, pa.large_string())


def join_texts(parts: list[pa.Array], columns: DocumentColumns) -> pa.Array:
    """One text a row out of its columns; a missing value counts as an empty one."""
    if columns.template is None:
        filled = [pc.if_else(pc.equal(pc.binary_length(part), 0), None, part) for part in parts]
        if len(filled) == 1:
            return pc.fill_null(filled[0], "")
        # Arrow's join leaves out, altogether, a row in which every part is null.
        filled[0] = pc.if_else(pc.is_null(pc.coalesce(*filled)), "", filled[0])
        return pc.binary_join_element_wise(*filled, pa.scalar("\n\n", pa.large_string()), null_handling="skip")
    by_name = dict(zip(columns.text_columns(), parts, strict=True))
    pieces: list[Any] = []
    for literal, name in template_parts(columns.template):
        pieces += [pa.scalar(literal, pa.large_string())] if literal else []
        pieces += [by_name[name]] if name is not None else []
    separator = pa.scalar("", pa.large_string())
    return pc.binary_join_element_wise(*pieces, separator, null_handling="replace", null_replacement="")


def scrub(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def document_table(
    file: SourceFile,
    columns: DocumentColumns,
    numbers: np.ndarray,
    ids: pa.Array,
    text: pa.Array,
    errors: pa.Array,
    carried: dict[str, pa.Array],
) -> pa.Table:
    """Put a document table together; rows without an id are named after the file and their number in it."""
    given = pc.fill_null(pc.not_equal(ids, ""), False)
    if not pc.all(given).as_py():
        relative = scrub(file.relative)
        ids = pc.if_else(given, ids, pa.array([f"{relative}#{number}" for number in numbers.tolist()], pa.string()))
    path = pa.array([scrub(file.path)] * len(text), pa.string())
    types = columns.carry_types or [plain_type(values.type) for values in carried.values()]
    cast = [cast_carried(values, kind, name, file) for (name, values), kind in zip(carried.items(), types, strict=True)]
    schema = pa.schema([*COLUMNS, *(pa.field(name, kind) for name, kind in zip(carried, types, strict=True))])
    return pa.table([ids, text, hash_texts(text), path, errors, *cast], schema=schema)


def cast_carried(values: pa.Array, kind: pa.DataType, name: str, file: SourceFile) -> pa.Array:
    """Values of a carried column in the type that the table has for it; only casts that lose nothing.

    Raises:
        InputError: there is no such cast, or a value does not fit.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values if values.type == kind else values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{file.path}: column {name!r} is {values.type}, and {kind} in the table or in the first file, which it "
            f"cannot become ({first_words(error)}); leave it out of columns.carry, or convert the file"
        ) from None


def hash_texts(text: pa.Array) -> pa.Array:
    """blake2b-128 of each text's UTF-8 bytes, without a copy of them."""
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1].tolist() if offsets else [0]
    raw = memoryview(data) if data is not None else memoryview(b"")
    pairs = itertools.pairwise(bounds)
    digests = b"".join(hashlib.blake2b(raw[start:end], digest_size=16).digest() for start, end in pairs)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(text), [None, pa.py_buffer(digests)])
