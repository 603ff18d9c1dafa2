"""What a model is evaluated on, as it lies on a disk or on S3: retrieval in BEIR's layout, pairs with a similarity,
labelled texts.

A set is refused whole where a line of it is wrong: a judgement that points nowhere would silently lower every figure.
Each set has a fingerprint of what was read, so that figures of two days are known to be of the same data.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import InputError
from pipeline.shards import read_file
from pipeline.storage import first_words

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Questions, documents, and which documents answer which question."""

    document_ids: list[str]
    documents: list[str]
    query_ids: list[str]
    queries: list[str]
    """Those that have an answer."""
    judgements: dict[str, dict[str, int]]
    """Query id -> document id -> grade, 0 for a document that was judged and is no answer."""
    fingerprint: str


@dataclass(frozen=True, slots=True)
class SimilaritySet:
    """Pairs of texts, and how alike people find them."""

    first: list[str]
    second: list[str]
    scores: list[float]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Texts with a label each, to train a probe on and to test it on."""

    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]
    fingerprint: str


def read_retrieval(folder: str, split: str = "test") -> RetrievalSet:
    """A folder, local or s3://, with corpus.jsonl (`_id`, `text`, `title` where there is one), queries.jsonl
    (`_id`, `text`) and qrels/SPLIT.tsv (query id, document id, grade, under a line of headings).

    Raises:
        InputError: a missing file, a line that is wrong or points nowhere, no question with an answer.
    """
    documents = dict(read_texts(folder, CORPUS))
    queries = dict(read_texts(folder, QUERIES))
    name = f"qrels/{split}.tsv"
    judgements: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines_of(folder, name), 1):
        where, parts = f"{folder}/{name}, line {number}", line.split("\t")
        if number == 1 and not parts[-1].lstrip("-").isdigit():
            continue
        if len(parts) != 3 or not parts[2].lstrip("-").isdigit():
            raise InputError(f"{where}: expected a query id, a document id and a whole grade between tabs")
        for kind, known, id, file in (
            ("query", queries, parts[0], QUERIES),
            ("document", documents, parts[1], CORPUS),
        ):
            if id not in known:
                raise InputError(f"{where}: the {kind} {id!r} is not in {file}; correct the line or add the {kind}")
        judgements.setdefault(parts[0], {})[parts[1]] = int(parts[2])
    judgements = {query: grades for query, grades in judgements.items() if max(grades.values()) > 0}
    if not judgements:
        raise InputError(f"{folder}/{name} has no question with an answer; a grade above 0 marks one")
    query_ids = [id for id in queries if id in judgements]
    return RetrievalSet(
        document_ids=list(documents),
        documents=list(documents.values()),
        query_ids=query_ids,
        queries=[queries[id] for id in query_ids],
        judgements=judgements,
        fingerprint=fingerprint_of([documents, [(id, queries[id], judgements[id]) for id in query_ids]]),
    )


def read_texts(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """(id, text) of a file of BEIR's; a title stands before its text."""
    seen: set[str] = set()
    for number, line in enumerate(lines_of(folder, name), 1):
        where = f"{folder}/{name}, line {number}"
        row = parse_row(line, where)
        id, text, title = row.get("_id"), row.get("text"), row.get("title") or ""
        if not isinstance(id, str) or not isinstance(text, str) or not isinstance(title, str):
            raise InputError(f"{where}: expected the texts _id and text")
        if id in seen:
            raise InputError(f"{where}: the id {id!r} stands there twice; ids must differ")
        seen.add(id)
        yield id, f"{title} {text}".strip()
    if not seen:
        raise InputError(f"{folder}/{name} is empty")


def read_similarity(file: str) -> SimilaritySet:
    """Parquet or JSON Lines with `sentence1`, `sentence2` and `score`.

    Raises:
        InputError: a missing file or column, a score that is no number, fewer than three pairs.
    """
    rows = read_rows(file, {"sentence1": str, "sentence2": str, "score": float})
    if len(rows) < 3:
        raise InputError(f"{file} has {len(rows)} pairs; a correlation needs three")
    first, second, scores = ([row[i] for row in rows] for i in range(3))
    return SimilaritySet(first, second, scores, fingerprint_of(rows))


def read_labelled(train: str, test: str) -> LabelledSet:
    """Two files, Parquet or JSON Lines, with `text` and `label` (text or whole number).

    Raises:
        InputError: a missing file or column, an empty set, one label only, a label of the test that is never trained.
    """
    columns = {"text": str, "label": (str, int)}
    rows = [read_rows(file, columns) for file in (train, test)]
    known = {str(label) for _, label in rows[0]}
    if len(known) < 2:
        raise InputError(f"{train} has the label {known.pop()!r} only; a classifier needs two")
    for number, (_, label) in enumerate(rows[1], 1):
        if str(label) not in known:
            raise InputError(f"{test}, row {number}: the label {str(label)!r} is not in {train}; labels must fit")
    (train_texts, train_labels), (test_texts, test_labels) = (
        ([text for text, _ in found], [str(label) for _, label in found]) for found in rows
    )
    return LabelledSet(train_texts, train_labels, test_texts, test_labels, fingerprint_of(rows))


def read_rows(file: str, columns: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The named columns of a Parquet or JSON Lines file, row by row; a whole number may stand for a float.

    Raises:
        InputError: a missing file or column, a value of another kind.
    """
    folder, _, name = file.rpartition("/")
    if name.endswith(".parquet"):
        try:
            table = pq.read_table(io.BytesIO(read(folder, name)))
        except pa.ArrowException as error:
            raise InputError(f"{file} cannot be read as Parquet: {first_words(error)}") from None
        if missing := [column for column in columns if column not in table.column_names]:
            raise InputError(f"{file} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
        found: Iterable[tuple[str, dict[str, Any]]] = (
            (f"{file}, row {i}", row) for i, row in enumerate(table.select(list(columns)).to_pylist(), 1)
        )
    else:
        places = ((f"{file}, line {i}", line) for i, line in enumerate(lines_of(folder, name), 1))
        found = ((where, parse_row(line, where)) for where, line in places)
    rows = []
    for where, row in found:
        for column, kind in columns.items():
            value = row.get(column)
            if isinstance(value, int) and not isinstance(value, bool) and kind is float:
                row[column] = value = float(value)
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:
                raise InputError(f"{where}: {column} is {value!r}; expected {expected(kind)}")
        rows.append(tuple(row[column] for column in columns))
    if not rows:
        raise InputError(f"{file} is empty")
    return rows


def expected(kind: Any) -> str:
    return {str: "text", float: "a number"}.get(kind, "text or a whole number")


def read(folder: str, name: str) -> bytes:
    """A file, whole.

    Raises:
        InputError: it is missing.
    """
    data = read_file(folder or ".", name)
    if data is None:
        raise InputError(f"{folder or '.'} has no {name}; name another place, or add the file")
    return data


def lines_of(folder: str, name: str) -> Sequence[str]:
    try:
        text = read(folder, name).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{folder}/{name} is not UTF-8") from None
    # Not str.splitlines: JSON may hold U+2028 as it is.
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is a JSON {type(row).__name__}, expected an object")
    return row


def fingerprint_of(content: Any) -> str:
    """32 hex digits: blake2b-128 of what was read, as JSON."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
