"""What words alone find: BM25 and tf-idf, the baselines that a retrieval model has to beat.

Both index words of two letters or more, lower case, without stemming or stop words, so that a figure of today means
what it will mean tomorrow. scikit-learn counts; it is an extra, for evaluation only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model.errors import InputError

LEXICAL = ("bm25", "tf-idf")
K1, B = 1.2, 0.75
"""Lucene's defaults."""

Scorer = Callable[[slice], np.ndarray]
"""Scores of some queries over all documents, (Q, N) float32; -inf where a document is no answer at all."""


def needed(module: str) -> Any:
    """A module of the `evaluate` extra.

    Raises:
        InputError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"evaluation needs {error.name}; install it with pip install -e '.[evaluate]' in the checkout"
        ) from None


def lexical_scorer(name: str, documents: Sequence[str], queries: Sequence[str]) -> Scorer:
    """A scorer of one of LEXICAL over documents and queries that are given whole."""
    make = {"bm25": bm25, "tf-idf": tfidf}[name]
    queries_QW, documents_WN = make(documents, queries)

    def score(chosen: slice) -> np.ndarray:
        scores = (queries_QW[chosen] @ documents_WN).toarray().astype(np.float32)
        scores[scores <= 0] = -np.inf
        return scores

    return score


def bm25(documents: Sequence[str], queries: Sequence[str]) -> tuple[Any, Any]:
    """Counts of the queries' words, (Q, W), and Okapi BM25's weights, (W, N), both sparse (Robertson and Zaragoza 2009;
    the idf is Lucene's, which is never negative).
    """
    text, sparse = needed("sklearn.feature_extraction.text"), needed("scipy.sparse")
    counter = text.CountVectorizer()
    counts_NW = counter.fit_transform(documents).astype(np.float64).tocoo()
    num_documents = counts_NW.shape[0]
    length_N = np.asarray(counts_NW.sum(axis=1)).ravel()
    found_W = np.bincount(counts_NW.col, minlength=counts_NW.shape[1])
    idf_W = np.log1p((num_documents - found_W + 0.5) / (found_W + 0.5))
    norm_N = K1 * (1 - B + B * length_N / max(length_N.mean(), 1e-12))
    counts = counts_NW.data
    weights = idf_W[counts_NW.col] * counts * (K1 + 1) / (counts + norm_N[counts_NW.row])
    weights_WN = sparse.csr_matrix((weights, (counts_NW.col, counts_NW.row)), shape=counts_NW.shape[::-1])
    return counter.transform(queries), weights_WN


def tfidf(documents: Sequence[str], queries: Sequence[str]) -> tuple[Any, Any]:
    """Unit tf-idf vectors of the queries, (Q, W), and of the documents, (W, N): a product of the two is a cosine."""
    vectorizer = tfidf_vectorizer()
    documents_NW = vectorizer.fit_transform(documents)
    return vectorizer.transform(queries), documents_NW.T.tocsr()


def tfidf_vectorizer() -> Any:
    """Sublinear in the count, like all of tf-idf here."""
    return needed("sklearn.feature_extraction.text").TfidfVectorizer(sublinear_tf=True)


def tfidf_pairs(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """The cosine of each pair, with document frequencies from the texts of all pairs, each counted once."""
    vectorizer = tfidf_vectorizer().fit(dict.fromkeys([*first, *second]))
    a, b = vectorizer.transform(first), vectorizer.transform(second)
    return np.asarray(a.multiply(b).sum(axis=1)).ravel()
