"""From vectors to the figures of retrieval: cosines under each representation, the best of a document's chunks, the
first hundred documents, and what trec_eval says of them.

The metrics are trec_eval's own C code, by `pytrec_eval-terrier`, so that they are the ones of every published table.
Shape suffixes: Q queries, R rows (vectors), N documents, D width.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jobs.evaluation_sets import RetrievalSet
from jobs.lexical import Scorer, needed
from pipeline.vectors import to_int8

DEPTH = 100
"""Documents that are kept for a query."""
CANDIDATES = 100
"""Rows that binary codes find, to be ordered anew by their float32 vectors."""
NDCG, RECALL, MRR = "ndcg@10", "recall@{}", "mrr@10"
BLOCK_VALUES = 1 << 24
"""Scores that are held at once."""


def unit(vectors_RD: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero stays zero."""
    vectors = np.asarray(vectors_RD, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def dense_scorer(
    queries_QD: np.ndarray, rows_RD: np.ndarray, first_N: np.ndarray, representation: str = "float32"
) -> Scorer:
    """The largest cosine between a query and a row of each document.

    Args:
        first_N: ascending, the first row of each document; its rows follow one another.
        representation: of the rows, queries staying in float32. "float32"; "int8": as `pipeline.vectors` stores them;
            "binary": signs find CANDIDATES rows, which their float32 vectors order; "dim64": the first 64 dimensions.
    """
    queries, rows = unit(queries_QD), unit(rows_RD)
    if representation.startswith("dim"):
        dim = int(representation.removeprefix("dim"))
        queries, rows = unit(queries[:, :dim]), unit(rows[:, :dim])
    elif representation == "int8":
        rows = unit(to_int8(rows).astype(np.float32))
    signs = np.where(rows > 0, 1, -1).astype(np.float32) if representation == "binary" else None

    def score(chosen: slice) -> np.ndarray:
        scores_QR = queries[chosen] @ rows.T
        if signs is not None and len(rows) > CANDIDATES:
            # Of ones and minus ones, the product is the width less twice the Hamming distance.
            likeness_QR = np.where(queries[chosen] > 0, 1, -1).astype(np.float32) @ signs.T
            left_QR = np.argpartition(likeness_QR, -CANDIDATES, axis=1)[:, :-CANDIDATES]
            np.put_along_axis(scores_QR, left_QR, -np.inf, axis=1)
        return np.maximum.reduceat(scores_QR, first_N, axis=1)

    return score


def rank(scorer: Scorer, set: RetrievalSet) -> dict[str, dict[str, float]]:
    """The first DEPTH documents of every query with their scores, as trec_eval wants them."""
    run: dict[str, dict[str, float]] = {}
    ids = np.array(set.document_ids, dtype=object)
    depth = min(DEPTH, len(ids))
    queries_at_once = max(1, BLOCK_VALUES // len(ids))
    for start in range(0, len(set.queries), queries_at_once):
        chosen = slice(start, min(start + queries_at_once, len(set.queries)))
        scores_QN = scorer(chosen)
        best_QK = np.argpartition(scores_QN, -depth, axis=1)[:, -depth:]
        for query, best_K, scores_N in zip(set.query_ids[chosen], best_QK, scores_QN, strict=True):
            found = best_K[np.isfinite(scores_N[best_K])]
            run[query] = dict(zip(ids[found], scores_N[found].tolist(), strict=True))
    return run


def judge(
    run: Mapping[str, Mapping[str, float]], set: RetrievalSet, cutoffs: Sequence[int] = (10, 100)
) -> dict[str, np.ndarray]:
    """Metric -> its value for every query, (Q,), in the order of the set: ndcg@10, mrr@10, recall at each cutoff."""
    pytrec_eval = needed("pytrec_eval")
    names = {NDCG: "ndcg_cut_10", **{RECALL.format(k): f"recall_{k}" for k in cutoffs}}
    judgements = {query: set.judgements[query] for query in set.query_ids}
    wanted = {"ndcg_cut.10", "recall." + ",".join(map(str, cutoffs))}
    whole = pytrec_eval.RelevanceEvaluator(judgements, wanted).evaluate(run)
    # trec_eval's reciprocal rank has no cutoff of its own. It puts the later id first in a tie, and so does this.
    short = {q: dict(sorted(d.items(), key=lambda item: (item[1], item[0]))[-10:]) for q, d in run.items()}
    first = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(short)
    values = {
        name: np.array([whole.get(query, {}).get(theirs, 0.0) for query in set.query_ids])
        for name, theirs in names.items()
    }
    values[MRR] = np.array([first.get(query, {}).get("recip_rank", 0.0) for query in set.query_ids])
    return {name: values[name] for name in (NDCG, MRR, *list(names)[1:])}


def long_queries(set: RetrievalSet, long_words: int) -> np.ndarray:
    """Which queries, (Q,), have answers in documents of more than `long_words` words only.

    Words, not tokens: so the choice is the same for every model.
    """
    is_long = {id: len(text.split()) > long_words for id, text in zip(set.document_ids, set.documents, strict=True)}
    return np.array(
        [all(is_long[id] for id, grade in set.judgements[query].items() if grade > 0) for query in set.query_ids]
    )
