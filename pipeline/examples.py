"""Examples to fine-tune on: Parquet or JSON Lines -> tokens and targets, checked to the last row before training.

A row is an example of one task, known by its columns. Equal texts are tokenized and kept once; being the same text, or
having the same id, is also what tells that two rows ask or answer the same: the first is in `text_N`, the second in
`key_N`. Loads no torch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from model.errors import InputError
from pipeline.columns import scrub
from pipeline.storage import SourceFile, filesystem, first_words, list_sources

IGNORED = -100
"""Target of a token that has none."""
TEXTS_AT_ONCE = 20_000
BLOCK_BYTES = 1 << 26
"""Longest line of JSON."""

STRINGS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())
COLUMNS: dict[str, tuple[dict[str, pa.DataType | None], dict[str, pa.DataType | None]]] = {
    "contrastive": (
        {"query": pa.string(), "positive": pa.string()},
        {"negatives": STRINGS, "positive_id": None, "negative_ids": None},
    ),
    "distillation": ({"text": pa.string(), "vector": NUMBERS}, {}),
    "classification": ({"text": pa.string(), "label": None}, {}),
    "regression": ({"text": pa.string(), "label": pa.float64()}, {}),
    "tagging": ({"tokens": STRINGS, "tags": STRINGS}, {}),
    "masked": ({"text": pa.string()}, {}),
    "mining": ({"query": pa.string()}, {"positive": pa.string(), "positive_id": None}),
}
"""Columns that a task needs, and those that it takes where they are there; None is a column of any simple type."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become examples. What is here decides the tokens."""

    task: str
    max_tokens: int
    """Longest text, special tokens included; what is beyond is cut off, and counted."""
    query_prompt: str = ""
    prompt: str = ""
    """Put before queries, and before all other texts."""
    pool_prompt: bool = True
    """Whether the tokens of a prompt are pooled with the text's."""
    names: tuple[str, ...] = ()
    """Labels by number, where they are settled already; else all that occur, sorted."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenized rows. X tokens, U different texts, N texts of examples, E examples."""

    tokens_X: np.ndarray
    """int32 ids of the different texts end to end, special tokens included."""
    offsets_U: np.ndarray
    """int64, U + 1."""
    skipped_U: np.ndarray
    """int32: tokens at the beginning that are not pooled."""
    first_E: np.ndarray
    """int64, E + 1: where the texts of an example begin; the query comes first, then the positive, then negatives."""
    text_N: np.ndarray
    """int64: which of the different texts it is."""
    key_N: np.ndarray
    """int64: equal for texts of one document."""
    targets: np.ndarray
    """Vectors (E, dim) float32, labels (E,) int64 or float32, or nothing."""
    tags_X: np.ndarray
    """int64: the tag of each token, `IGNORED` where there is none; or nothing."""
    names: tuple[str, ...] = ()
    """Of labels or tags, by number."""
    truncated: int = 0
    """Different texts that were cut."""

    @property
    def num_examples(self) -> int:
        return len(self.first_E) - 1

    def fingerprint(self) -> str:
        """A hash of all that training sees."""
        digest = hashlib.blake2b(json.dumps(self.names).encode(), digest_size=16)
        for array in (self.tokens_X, self.offsets_U, self.skipped_U, self.first_E, self.text_N, self.key_N):
            digest.update(np.ascontiguousarray(array).data)
        for array in (self.targets, self.tags_X):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def text(self, number: int) -> np.ndarray:
        """The tokens of one of the different texts."""
        return self.tokens_X[self.offsets_U[number] : self.offsets_U[number + 1]]


def read_examples(source: str, tokenizer: Tokenizer, reading: Reading) -> Examples:
    """Read a file, folder, glob or s3:// prefix, in the order of file names and rows.

    Raises:
        InputError: nothing there, a column is missing or of another kind, or a row that cannot be learned from: the
            message says which.
    """
    table = read_table(source, reading.task)
    kinds: dict[str, Callable[[pa.Table, Tokenizer, Reading], Examples]] = {
        "contrastive": _pairs,
        "distillation": _vectors,
        "classification": _labels,
        "regression": _labels,
        "tagging": _tags,
        "masked": _texts,
    }
    return kinds[reading.task](table, tokenizer, reading)


def read_table(source: str, task: str) -> pa.Table:
    """The rows of a source with the columns of a task; `file` and `row` beside them say where each is from.

    Raises:
        InputError: as `read_examples`.
    """
    tables = []
    for file in list_sources(source):
        if file.format != "text" and file.size:
            table = _read_file(file, task)
            path = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), [file.path])
            table = table.append_column("file", path).append_column("row", pa.array(np.arange(1, len(table) + 1)))
            tables.append(table)
    if not sum(map(len, tables)):
        raise InputError(f"{source} holds no row to learn from; name Parquet or JSON Lines files with some")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the files of {source} differ in their columns: {first_words(error)}") from None


def _read_file(file: SourceFile, task: str) -> pa.Table:
    needed, wanted = COLUMNS[task]
    files, path = filesystem(file.path)
    known = {**needed, **wanted}
    try:
        if file.format == "parquet":
            with files.open_input_file(path) as stream:
                opened = pq.ParquetFile(stream)
                table = opened.read([name for name in known if name in opened.schema_arrow.names])
                names = opened.schema_arrow.names
        else:
            with files.open_input_stream(path, compression="detect") as stream:
                table = pajson.read_json(stream, pajson.ReadOptions(block_size=BLOCK_BYTES))
            names = table.column_names
            table = table.select([name for name in known if name in names])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path} cannot be read: {first_words(error)}") from None
    if missing := [name for name in needed if name not in names]:
        raise InputError(
            f"{file.path} has no column {missing[0]!r}, which {task} needs; it has {', '.join(names) or 'none'}"
        )
    for name in table.column_names:
        table = table.set_column(table.column_names.index(name), name, _cast(table[name], known[name], name, file))
    return table


def _cast(column: pa.ChunkedArray, kind: pa.DataType | None, name: str, file: SourceFile) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kind is None:
        return column
    wanted = {pa.string(): pa.large_string(), STRINGS: pa.large_list(pa.large_string())}.get(kind, kind)
    wanted = pa.large_list(pa.float32()) if kind == NUMBERS else wanted
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_null)
    try:
        if pa.types.is_list(kind) and not any(check(column.type) for check in lists):
            raise pa.ArrowInvalid("no list")
        return column.cast(wanted)
    except pa.ArrowException:
        raise InputError(f"{file.path}: column {name!r} is {column.type}, expected {kind}") from None


def _pairs(table: pa.Table, tokenizer: Tokenizer, reading: Reading) -> Examples:
    queries, positives = strings(table, "query"), strings(table, "positive")
    negatives: list[list[str]] = [[]] * len(queries)
    if "negatives" in table.column_names:
        negatives = [some or [] for some in table["negatives"].to_pylist()]
        for row, some in enumerate(negatives):
            if not all(text and text.strip() for text in some):
                raise InputError(f"{_where(table, row)}: a negative is empty; leave it out")
    questions = _numbers(queries)
    documents = [text for positive, some in zip(positives, negatives, strict=True) for text in (positive, *some)]
    texts = _numbers(documents)
    counts = np.array([2 + len(some) for some in negatives])
    first_E = np.concatenate([[0], np.cumsum(counts)])
    is_query = np.zeros(first_E[-1], dtype=bool)
    is_query[first_E[:-1]] = True
    text_N, key_N = np.empty(first_E[-1], np.int64), np.empty(first_E[-1], np.int64)
    text_N[is_query], text_N[~is_query] = questions[0], texts[0] + len(questions[1])
    key_N[is_query], key_N[~is_query] = questions[0], _document_keys(table, negatives, texts[0])
    prompts = [reading.query_prompt] * len(questions[1]) + [reading.prompt] * len(texts[1])
    tokens = _tokenize([*questions[1], *texts[1]], prompts, tokenizer, reading)
    return _examples(tokens, first_E, text_N, key_N)


def _document_keys(table: pa.Table, negatives: list[list[str]], texts: np.ndarray) -> np.ndarray:
    """A number for the document of each positive and negative: by id where there are ids, else by text."""
    if "positive_id" not in table.column_names:
        return texts
    positive_ids = table["positive_id"].to_pylist()
    negative_ids: list[list[Any]] = [[]] * len(positive_ids)
    if "negative_ids" in table.column_names:
        negative_ids = [some or [] for some in table["negative_ids"].to_pylist()]
    names: list[str] = []
    for row, (own, others, some) in enumerate(zip(positive_ids, negative_ids, negatives, strict=True)):
        if others and len(others) != len(some):
            raise InputError(f"{_where(table, row)}: {len(some)} negatives have {len(others)} negative_ids")
        at = len(names)
        ids = [own, *(others or [None] * len(some))]
        # What has no id is known by its text; the two kinds of names cannot meet.
        names += [f"text {texts[at + i]}" if value is None else f"id {value}" for i, value in enumerate(ids)]
    return _numbers(names)[0]


def _vectors(table: pa.Table, tokenizer: Tokenizer, reading: Reading) -> Examples:
    column = table["vector"].combine_chunks()
    lengths = np.diff(column.offsets.to_numpy()) if len(column) else np.zeros(0)
    if column.null_count or (lengths != lengths[0]).any() or lengths[0] == 0:
        row = int(np.flatnonzero(np.asarray(column.is_null()) | (lengths != lengths[0]) | (lengths == 0))[0])
        raise InputError(f"{_where(table, row)}: the vector has {lengths[row]} dimensions, the first {lengths[0]}")
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InputError(f"{_where(table, row)}: the vector holds something that is no number")
    return dataclasses.replace(_texts(table, tokenizer, reading), targets=vectors)


def _texts(table: pa.Table, tokenizer: Tokenizer, reading: Reading) -> Examples:
    numbers, texts = _numbers(strings(table, "text"))
    tokens = _tokenize(texts, [reading.prompt] * len(texts), tokenizer, reading)
    return _examples(tokens, np.arange(len(numbers) + 1), numbers, numbers)


def _labels(table: pa.Table, tokenizer: Tokenizer, reading: Reading) -> Examples:
    values = table["label"].to_pylist()
    if None in values:
        raise InputError(f"{_where(table, values.index(None))}: the label is missing")
    targets, names = np.array(values, np.float32) if reading.task == "regression" else np.empty(0), reading.names
    if reading.task == "classification":
        targets, names = _name([[value] for value in values], names, table, "label")
    elif not np.isfinite(targets).all():
        raise InputError(f"{_where(table, int(np.flatnonzero(~np.isfinite(targets))[0]))}: the label is no number")
    return dataclasses.replace(_texts(table, tokenizer, reading), targets=targets, names=names)


def _name(
    values: Sequence[Sequence[Any]], names: tuple[str, ...], table: pa.Table, what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers, one row's after the other's, and their names."""
    for row, some in enumerate(values):
        for value in some:
            if not isinstance(value, str | int) or value == "":
                raise InputError(f"{_where(table, row)}: the {what} {value!r} is neither a name nor a whole number")
    if not names:
        # Whole numbers in their order, names in theirs: 2 comes before 10.
        found = {str(value) for some in values for value in some}
        names = tuple(sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else name)))
    if len(names) < 2:
        raise InputError(f"all {what}s are {names[0]!r}; there is nothing to tell apart")
    numbers = {name: number for number, name in enumerate(names)}
    for row, some in enumerate(values):
        for value in some:
            if str(value) not in numbers:
                known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise InputError(f"{_where(table, row)}: the {what} {str(value)!r} is none of the model's ({known})")
    return np.array([numbers[str(value)] for some in values for value in some], np.int64), names


def _tags(table: pa.Table, tokenizer: Tokenizer, reading: Reading) -> Examples:
    words, tags = table["tokens"].to_pylist(), table["tags"].to_pylist()
    for row, (some, its) in enumerate(zip(words, tags, strict=True)):
        if not some or not all(word and word.strip() for word in some):
            raise InputError(f"{_where(table, row)}: there are no tokens, or one of them is empty")
        if its is None or len(its) != len(some):
            raise InputError(f"{_where(table, row)}: {len(some)} tokens have {len(its or [])} tags")
    numbers, names = _name(tags, reading.names, table, "tag")
    ends = np.cumsum([len(some) for some in words])
    ids, targets, truncated = [], [], 0
    encoded = tokenizer.encode_batch([scrub(" ".join(some)) for some in words])
    for some, its, one in zip(words, np.split(numbers, ends[:-1]), encoded, strict=True):
        # A word's tag belongs to the token that holds its first character.
        begins = np.cumsum([0, *(len(scrub(word)) + 1 for word in some[:-1])])
        target = np.full(len(one.ids), IGNORED, np.int64)
        spans = np.array(one.offsets)
        for begin, tag in zip(begins.tolist(), its.tolist(), strict=True):
            holds = np.flatnonzero((spans[:, 0] <= begin) & (begin < spans[:, 1]))
            if len(holds) and target[holds[0]] == IGNORED:
                target[holds[0]] = tag
        truncated += len(one.ids) > reading.max_tokens
        ids.append(_cut(np.array(one.ids, np.int32), reading.max_tokens))
        targets.append(_cut(target, reading.max_tokens))
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
    order = np.arange(len(ids))
    tokens = (np.concatenate(ids), offsets, np.zeros(len(ids), np.int32), truncated)
    examples = _examples(tokens, np.arange(len(ids) + 1), order, order)
    return dataclasses.replace(examples, tags_X=np.concatenate(targets), names=names)


def _examples(
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    first_E: np.ndarray,
    text_N: np.ndarray,
    key_N: np.ndarray,
) -> Examples:
    """Without targets."""
    tokens_X, offsets_U, skipped_U, truncated = tokens
    none = np.empty(0, np.int64)
    first_E = first_E.astype(np.int64)
    return Examples(tokens_X, offsets_U, skipped_U, first_E, text_N, key_N, none, none, truncated=truncated)


def _tokenize(
    texts: Sequence[str], prompts: Sequence[str], tokenizer: Tokenizer, reading: Reading
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Tokens end to end, offsets, tokens to skip, and how many texts were cut."""
    # As `Embedder` counts them: [CLS] and the prompt's tokens.
    skips = {p: 0 if reading.pool_prompt or not p else len(tokenizer.encode(p).ids) - 1 for p in set(prompts)}
    parts, lengths, truncated = [], [], 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = slice(start, start + TEXTS_AT_ONCE)
        full = [scrub(prompt + text) for prompt, text in zip(prompts[some], texts[some], strict=True)]
        for one in tokenizer.encode_batch_fast(full):
            truncated += len(one.ids) > reading.max_tokens
            parts.append(_cut(np.array(one.ids, np.int32), reading.max_tokens))
            lengths.append(len(parts[-1]))
    skipped = np.array([skips[prompt] for prompt in prompts], np.int32)
    # Something of every text is pooled, however long its prompt.
    return (
        np.concatenate(parts),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.minimum(skipped, np.array(lengths) - 1),
        truncated,
    )


def _cut(values: np.ndarray, max_tokens: int) -> np.ndarray:
    """The first `max_tokens`, the closing special token kept."""
    return values if len(values) <= max_tokens else np.concatenate([values[: max_tokens - 1], values[-1:]])


def strings(table: pa.Table, name: str) -> list[str]:
    values = table[name].to_pylist()
    for row, value in enumerate(values):
        if not value or not value.strip():
            raise InputError(f"{_where(table, row)}: the {name} is empty; leave the row out, or give it one")
    return values


def _numbers(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Each value's number among the different ones, in the order of their first appearance, and those."""
    coded = pa.array(values, pa.large_string()).dictionary_encode()
    return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()


def _where(table: pa.Table, row: int) -> str:
    return f"{table['file'][row].as_py()} row {table['row'][row].as_py()}"
