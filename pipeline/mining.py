"""Hard negatives out of an embedding table: what lies near a question and is no answer to it.

One pass over the table compares every vector with every question, exactly. Which of the nearest are negatives is then a
matter of ranks and of a margin below the positive. Loads no torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.table import EmbeddingTable

ROWS = ("document_id", "chunk", "char_start", "char_end", "text_hash", "source")
"""Columns of the table that tell where a text is."""
SCORES_AT_ONCE = 1 << 23
NONE = -1
"""Row number of a positive that the table does not hold."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """What lies near the questions. Q questions, K rows of the table for each."""

    rows: pa.Table
    """All rows of the table, without vectors."""
    document_R: np.ndarray
    """int64: equal for rows of one document."""
    row_QK: np.ndarray
    """int64 row numbers, best first; `NONE` where the table has fewer."""
    score_QK: np.ndarray
    """float32 cosines."""
    positive_Q: np.ndarray
    """int64: the best row among those of the question's positive document, or `NONE`."""
    positive_score_Q: np.ndarray
    """float32, and minus infinity where there is none."""
    rank_Q: np.ndarray
    """int64: how many documents come before the positive's, as far as K rows tell; K where it is not among them."""


def find_nearest(table: EmbeddingTable, questions_QD: np.ndarray, positive_ids: Sequence[str], k: int) -> Nearest:
    """Compare all questions with all rows.

    Args:
        questions_QD: float32 of the table's dimension, of any length.
        positive_ids: the document that answers each.
        k: rows to keep of each.
    """
    questions_QD = unit(questions_QD)
    known = pa.array(positive_ids, pa.string()).dictionary_encode()
    askers = [np.flatnonzero(known.indices.to_numpy() == number) for number in range(len(known.dictionary))]
    num = len(questions_QD)
    row_QK, score_QK = np.full((num, k), NONE), np.full((num, k), -np.inf, np.float32)
    positive_Q, positive_score_Q = np.full(num, NONE), np.full(num, -np.inf, np.float32)
    parts, first = [], 0
    rows_at_once = max(SCORES_AT_ONCE // max(num, 1), 64)
    for batch in table.dataset.to_batches(columns=[*ROWS, "vector"], batch_size=rows_at_once):
        parts.append(batch.select(list(ROWS)))
        score_QR = questions_QD @ unit(vectors_of(batch.column("vector"))).T
        answers = pc.index_in(batch.column("document_id"), value_set=known.dictionary)
        for row in np.flatnonzero(np.asarray(answers.is_valid())).tolist():
            who = askers[answers[row].as_py()]
            better = who[score_QR[who, row] > positive_score_Q[who]]
            positive_Q[better], positive_score_Q[better] = first + row, score_QR[better, row]
        rows = np.broadcast_to(np.arange(first, first + len(batch)), score_QR.shape)
        row_QK, score_QK = best(np.hstack([row_QK, rows]), np.hstack([score_QK, score_QR]), k)
        first += len(batch)
    rows = pa.Table.from_batches(parts, table.dataset.schema.empty_table().select(list(ROWS)).schema)
    document_R = numbers_of(rows["document_id"])
    rank_Q = np.full(num, k)
    for question, positive in enumerate(positive_Q.tolist()):
        found = document_R[row_QK[question][row_QK[question] != NONE]]
        where = np.flatnonzero(found == document_R[positive]) if positive != NONE else found[:0]
        if len(where):
            rank_Q[question] = len(np.unique(found[: where[0]]))
    return Nearest(rows, document_R, row_QK, score_QK, positive_Q, positive_score_Q, rank_Q)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the nearest documents are negatives."""

    first_rank: int
    """How many of the nearest documents are passed over, the positives not counted."""
    last_rank: int
    """How many are looked at."""
    count: int
    """Most negatives of a question."""
    margin: float
    """How far below the positive's score that of a negative lies at least."""


def choose_negatives(
    nearest: Nearest, answers: Sequence[Collection[str]], choice: Choice
) -> tuple[list[list[int]], int]:
    """The negatives of each question, hardest first.

    A document counts once, by its best row. Documents that answer the question, and others with the text of its
    positive, are no negatives and have no rank; neither has anything a question without a positive.

    Args:
        answers: ids of the documents that are known to answer each question.

    Returns:
        Row numbers, and how many documents within the ranks were passed over because of the margin.
    """
    names, hashes = nearest.rows["document_id"], nearest.rows["text_hash"]
    chosen: list[list[int]] = []
    too_near = 0
    for question, positive in enumerate(nearest.positive_Q.tolist()):
        chosen.append([])
        if positive == NONE:
            continue
        limit = nearest.positive_score_Q[question] - choice.margin
        seen, rank = {int(nearest.document_R[positive])}, 0
        text = hashes[positive].as_py()
        for row, score in zip(nearest.row_QK[question].tolist(), nearest.score_QK[question].tolist(), strict=True):
            if row == NONE or rank == choice.last_rank or len(chosen[-1]) == choice.count:
                break
            document = int(nearest.document_R[row])
            if document in seen:
                continue
            seen.add(document)
            if names[row].as_py() in answers[question] or hashes[row].as_py() == text:
                continue
            rank += 1
            if rank <= choice.first_rank:
                continue
            if score > limit:
                too_near += 1
                continue
            chosen[-1].append(row)
    return chosen, too_near


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """int64: equal for equal values."""
    if not len(column):
        return np.empty(0, np.int64)
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def vectors_of(column: pa.FixedSizeListArray) -> np.ndarray:
    """float32 (rows, dim)."""
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def best(row_QR: np.ndarray, score_QR: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best columns of each question, best first; among equals the one that came first."""
    order = np.argsort(-score_QR, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(row_QR, order, axis=1), np.take_along_axis(score_QR, order, axis=1)
