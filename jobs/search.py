"""`nightloom search`: the published vectors nearest to a question, with the text they stand for where it can be read.

The question goes through the model that the table was made with, with that model's prompt for questions. If the folder
holds other weights by now, the answer would be noise: that is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.configuration import ColumnSettings
from jobs.plan import read_columns
from model.errors import InputError
from model.folder import tokenizer_hash, weights_hash
from pipeline.documents import DocumentColumns, read_documents
from pipeline.ledger import read_records
from pipeline.storage import list_sources, local_model
from pipeline.table import PUBLISHED, EmbeddingTable

SNIPPET_CHARS = 160
MOST_BYTES = 64_000_000
"""Largest source file that is read for the sake of a snippet."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer."""

    rank: int
    score: float
    """Cosine of the angle between question and vector."""
    document_id: str
    chunk: int
    """Number of the chunk, or -1 for the whole document where a table has both."""
    source: str
    char_start: int
    char_end: int
    snippet: str | None
    """The beginning of the text, or None where its source cannot be read any more."""


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The answers to one question, best first."""

    job: str
    status: str
    table: str
    version: int
    query: str
    hits: list[Hit]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        if not self.hits:
            return f"{self.table} holds no vectors."
        lines = []
        for hit in self.hits:
            chunk = f"  chunk {hit.chunk}" if hit.chunk > 0 else ""
            lines.append(f"{hit.rank:>3}  {hit.score:.3f}  {hit.document_id}{chunk}")
            if hit.snippet:
                lines.append(f"            {hit.snippet}")
        return "\n".join(lines)


def run_search(
    uri: str,
    query: str,
    *,
    k: int = 10,
    model: str | None = None,
    elsewhere: Sequence[str] = (),
    device: str = "auto",
) -> SearchReport:
    """Search the published version of a table.

    Args:
        model: where the model of the table lies now; by default where it lay when the table was made.
        elsewhere: further places to look for it in.

    Raises:
        InputError: no published table, an empty question, a model that is not the table's.
    """
    if k < 1:
        raise InputError(f"-k is {k}; ask for one answer at least")
    if not query.strip():
        raise InputError("the question is empty")
    table = EmbeddingTable.open(uri, PUBLISHED)
    name = find_model(table, [model] if model else [table.model, *elsewhere])
    rows = table.search(encode_questions(table, name, [query], device)[0], k).to_pylist()
    texts = read_texts(table, rows)
    hits = [
        Hit(
            rank=rank,
            score=round(row["score"], 6),
            document_id=row["document_id"],
            chunk=row["chunk"],
            source=row["source"],
            char_start=row["char_start"],
            char_end=row["char_end"],
            snippet=snippet(texts.get(row["document_id"]), row["char_start"], row["char_end"]),
        )
        for rank, row in enumerate(rows, 1)
    ]
    return SearchReport(job="search", status="done", table=uri, version=table.version, query=query, hits=hits)


def encode_questions(table: EmbeddingTable, model: str, questions: Sequence[str], device: str) -> np.ndarray:
    """Questions in the table's space, (len(questions), dim): with the model's prompt for them, of unit length where the
    recipe says so.
    """
    from model.embedder import Embedder

    embedder = Embedder(model, device=device)
    embedder.normalize = table.recipe.normalize
    return embedder.encode_query(questions, truncate_dim=table.recipe.dim)


def find_model(table: EmbeddingTable, names: Sequence[str]) -> str:
    """The first of these model folders that has the weights and the tokenizer of the table.

    Raises:
        InputError: none has.
    """
    first: InputError | None = None
    for name in names:
        try:
            folder = local_model(name)
            if (weights_hash(folder), tokenizer_hash(folder)) == (table.recipe.weights, table.recipe.tokenizer):
                return folder
            raise InputError(f"{name} is not the model that {table.uri} was made with; name that one with --model")
        except InputError as error:
            first = first or error
    raise first or InputError(f"{table.uri} does not say which model it was made with; name it with --model")


def read_texts(table: EmbeddingTable, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Texts of the documents that were found, by id; those whose source is gone, changed or large are left out.

    A text is recognised by its hash, so that what is shown is what was embedded.
    """
    columns = columns_of(table)
    wanted = {row["text_hash"]: row["document_id"] for row in rows}
    texts: dict[str, str] = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        try:
            (file,) = list_sources(source)
            if file.size > MOST_BYTES:
                continue
            for part in read_documents(file, columns):
                for text_hash, text in zip(part["text_hash"].to_pylist(), part["text"], strict=True):
                    if text_hash in wanted:
                        texts[wanted[text_hash]] = text.as_py()
        except (InputError, OSError, ValueError):
            continue
    return texts


def columns_of(table: EmbeddingTable) -> DocumentColumns:
    """Which columns the last run read."""
    for record in reversed(read_records(table.uri)):
        if "configuration" in record:
            columns = json.dumps(record["configuration"]["columns"])
            return read_columns(ColumnSettings.model_validate_json(columns))
    return DocumentColumns()


def snippet(text: str | None, start: int, end: int) -> str | None:
    """The beginning of text[start:end] on one line, cut at a word."""
    if text is None:
        return None
    words = " ".join(text[start:end][: 4 * SNIPPET_CHARS].split())
    if len(words) <= SNIPPET_CHARS:
        return words
    return words[:SNIPPET_CHARS].rpartition(" ")[0] + " ..."
