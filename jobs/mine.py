"""`nightloom mine`: pairs with hard negatives out of an embedding table, and only those pairs that are consistent.

The questions are encoded by the table's own model and compared with every vector of the published version. What comes
out is a Parquet file that `nightloom finetune` reads, whose schema says which table, version and settings it is from.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from jobs.configuration import Settings
from jobs.report import clock, line
from jobs.search import columns_of, encode_questions, find_model
from model.errors import InputError
from pipeline.columns import hash_texts
from pipeline.documents import read_documents
from pipeline.examples import read_table, strings
from pipeline.mining import NONE, Choice, Nearest, choose_negatives, find_nearest
from pipeline.storage import filesystem, list_sources
from pipeline.table import PUBLISHED, EmbeddingTable

ROWS_PER_DOCUMENT = 4
"""Rows that are looked at for each document that is wanted, in a table with chunks."""
PROVENANCE = b"nightloom.mined"
"""Key of the schema's metadata under which the settings and the table stand."""


class MineConfiguration(Settings):
    """Everything that `nightloom mine` can be told."""

    table: str
    """Folder or s3:// prefix of an embedding table with a published version."""
    queries: str
    """File, folder, glob or s3:// prefix with columns `query` and `positive_id` (a document's id in the table), or
    `positive` (its whole text)."""
    output: str
    """Parquet file to write, local or s3://."""
    model: str | None = None
    """Where the table's model lies now; by default where it lay when the table was made."""
    negatives: int = Field(default=4, ge=0)
    """Most negatives of a question."""
    first_rank: int = Field(default=0, ge=0)
    """How many of the nearest documents are passed over: the nearest of all are often answers that nobody marked."""
    last_rank: int = Field(default=50, gt=0)
    """How many are looked at."""
    margin: float = 0.05
    """How far below the positive's score that of a negative must lie; what is nearer may be an answer too."""
    consistent_rank: int | None = Field(default=None, gt=0)
    """Leave a pair out whose positive is not among the so many nearest documents; by default none is."""
    device: str = "auto"
    """Where the questions are encoded."""


@dataclass(frozen=True, slots=True)
class MineReport:
    """What `nightloom mine` found."""

    job: str
    status: str
    output: str
    table: str
    version: int
    queries: int
    kept: int
    unknown: int
    """Whose positive the table does not hold."""
    inconsistent: int
    """Whose positive is not among the nearest."""
    negatives: int
    too_near: int
    """Documents within the ranks that the margin kept out."""
    seconds: float

    def __post_init__(self) -> None:
        if self.queries != self.kept + self.unknown + self.inconsistent:
            raise RuntimeError(f"{self.queries} questions were read, others accounted for: {asdict(self)}")

    def summary(self) -> str:
        return "\n".join(
            [
                f"{self.kept:,} pairs with {self.negatives:,} negatives in {self.output}",
                "",
                line("questions", f"{self.queries:,}"),
                line("unknown", f"{self.unknown:,} (the table has no such document)"),
                line("inconsistent", f"{self.inconsistent:,} (the positive is not near enough)"),
                line("too near", f"{self.too_near:,} documents that may be answers"),
                line("time", clock(self.seconds)),
            ]
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_mine(configuration: MineConfiguration) -> MineReport:
    """Find negatives for pairs.

    Raises:
        InputError: no published table, another model, questions without positives, none of which the table knows, or
            sources that cannot be read any more.
    """
    started = time.monotonic()
    if configuration.first_rank >= configuration.last_rank:
        raise InputError(
            f"first_rank is {configuration.first_rank} and last_rank {configuration.last_rank}; nothing is between them"
        )
    table = EmbeddingTable.open(configuration.table, PUBLISHED)
    pairs = read_table(configuration.queries, "mining")
    questions = strings(pairs, "query")
    positives = positive_ids(table, pairs)
    model = find_model(table, [configuration.model or table.model])
    vectors = encode_questions(table, model, questions, configuration.device)
    many = ROWS_PER_DOCUMENT if table.recipe.granularity != "document" else 1
    answers = answers_of(questions, positives)
    wanted = configuration.last_rank + max(map(len, answers))
    nearest = find_nearest(table, vectors, positives, min(wanted * many, max(table.dataset.count_rows(), 1)))
    known = nearest.positive_Q != NONE
    if not known.any():
        raise InputError(
            f"none of the {len(questions)} positives in {configuration.queries} is a document of {configuration.table} "
            f"(the first is {positives[0]!r})"
        )
    consistent = known & (nearest.rank_Q < (configuration.consistent_rank or np.iinfo(np.int64).max))
    choice = Choice(configuration.first_rank, configuration.last_rank, configuration.negatives, configuration.margin)
    chosen, too_near = choose_negatives(nearest, answers, choice)
    kept = np.flatnonzero(consistent).tolist()
    texts = read_texts(table, nearest, [row for q in kept for row in (int(nearest.positive_Q[q]), *chosen[q])])
    given = pairs["positive"].to_pylist() if "positive" in pairs.column_names else [None] * len(questions)
    mined = mined_table(nearest, kept, chosen, texts, questions, given)
    write(mined.replace_schema_metadata({PROVENANCE: provenance(configuration, table, pairs)}), configuration.output)
    return MineReport(
        job="mine",
        status="done",
        output=configuration.output,
        table=configuration.table,
        version=table.version,
        queries=len(questions),
        kept=len(kept),
        unknown=int((~known).sum()),
        inconsistent=int((known & ~consistent).sum()),
        negatives=sum(len(chosen[q]) for q in kept),
        too_near=too_near,
        seconds=round(time.monotonic() - started, 1),
    )


def positive_ids(table: EmbeddingTable, pairs: pa.Table) -> list[str]:
    """The document that answers each question, by id, or by the text that it has in the table."""
    if not {"positive_id", "positive"} & set(pairs.column_names):
        raise InputError("the questions have neither a column 'positive_id' nor 'positive'; one has to say the answer")
    if "positive_id" in pairs.column_names:
        return [str(value) for value in pairs["positive_id"].to_pylist()]
    rows = table.dataset.to_table(columns=["document_id", "text_hash"])
    ids = dict(zip(rows["text_hash"].to_pylist(), rows["document_id"].to_pylist(), strict=True))
    texts = pa.array(strings(pairs, "positive"), pa.large_string())
    return [ids.get(value, "") for value in hash_texts(texts).to_pylist()]


def answers_of(questions: Sequence[str], positives: Sequence[str]) -> list[set[str]]:
    """For each question the positives of all rows that ask the same."""
    answers: dict[str, set[str]] = {}
    for question, positive in zip(questions, positives, strict=True):
        answers.setdefault(question, set()).add(positive)
    return [answers[question] for question in questions]


def read_texts(table: EmbeddingTable, nearest: Nearest, rows: Sequence[int]) -> dict[int, str]:
    """The texts of some rows of the table: of a chunk its own. Each source file is read once.

    Raises:
        InputError: a source is gone, or has changed since.
    """
    wanted = nearest.rows.take(pa.array(sorted(set(rows)), pa.int64())).to_pylist()
    by_hash: dict[bytes, str] = {}
    needed = {row["text_hash"] for row in wanted}
    columns = columns_of(table)
    for source in dict.fromkeys(row["source"] for row in wanted):
        (file,) = list_sources(source)
        for part in read_documents(file, columns, with_carried=False):
            for text_hash, text in zip(part["text_hash"].to_pylist(), part["text"], strict=True):
                if text_hash in needed:
                    by_hash[text_hash] = text.as_py()
    texts = {}
    for number, row in zip(sorted(set(rows)), wanted, strict=True):
        if row["text_hash"] not in by_hash:
            raise InputError(
                f"{row['source']} no longer holds the text of document {row['document_id']!r} that {table.uri} was "
                "made of; bring the table up to date first"
            )
        texts[number] = by_hash[row["text_hash"]][row["char_start"] : row["char_end"]]
    return texts


def mined_table(
    nearest: Nearest,
    kept: Sequence[int],
    chosen: Sequence[Sequence[int]],
    texts: dict[int, str],
    questions: Sequence[str],
    given: Sequence[str | None],
) -> pa.Table:
    """The rows that come out; a positive's text is the one given, else the table's."""
    ids = nearest.rows["document_id"].to_pylist()
    scores = [dict(zip(nearest.row_QK[q].tolist(), nearest.score_QK[q].tolist(), strict=True)) for q in kept]
    positives = [int(nearest.positive_Q[q]) for q in kept]
    strings, floats = pa.list_(pa.string()), pa.list_(pa.float32())
    columns: dict[str, pa.Array] = {
        "query": pa.array([questions[q] for q in kept], pa.string()),
        "positive": pa.array([given[q] or texts[row] for q, row in zip(kept, positives, strict=True)], pa.string()),
        "negatives": pa.array([[texts[row] for row in chosen[q]] for q in kept], strings),
        "positive_id": pa.array([ids[row] for row in positives], pa.string()),
        "negative_ids": pa.array([[ids[row] for row in chosen[q]] for q in kept], strings),
        "positive_score": pa.array(nearest.positive_score_Q[list(kept)], pa.float32()),
        "positive_rank": pa.array(nearest.rank_Q[list(kept)], pa.int64()),
        "negative_scores": pa.array(
            [[score[row] for row in chosen[q]] for q, score in zip(kept, scores, strict=True)], floats
        ),
    }
    return pa.table(columns)


def provenance(configuration: MineConfiguration, table: EmbeddingTable, pairs: pa.Table) -> bytes:
    """Where the rows are from, as JSON."""
    digest = hashlib.blake2b(digest_size=16)
    for name in pairs.column_names:
        digest.update(json.dumps([name, pairs[name].to_pylist()]).encode())
    value: dict[str, Any] = {
        "table": table.uri,
        "version": table.version,
        "fingerprint": table.fingerprint,
        "queries": digest.hexdigest(),
        "settings": configuration.model_dump(),
    }
    return json.dumps(value, sort_keys=True).encode()


def write(mined: pa.Table, output: str) -> None:
    """Write a Parquet file, whole or not at all."""
    files, path = filesystem(output)
    try:
        files.create_dir(path.rpartition("/")[0], recursive=True)
        partial = f"{path}.partial"
        with files.open_output_stream(partial) as stream:
            pq.write_table(mined, stream)
        files.move(partial, path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{output} cannot be written: {str(error).splitlines()[0]}") from None
