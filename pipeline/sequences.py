"""Documents -> sequences: long ones are cut, none loses its tail; and pairs of segments for sentence ordering.

Sequences are only described here, by where they begin and end in which document; `lay_out` then puts the tokens of
some of them end to end. Suffixes: D documents, S sequences, N tokens of all documents, T tokens laid out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.permutation import below, draws, key_of, keys_of

ORDERED, SWAPPED, NOT_APPLICABLE = 0, 1, -100
"""Labels of sentence ordering; the last is what a cross entropy leaves out."""
PAIR = 3
"""The word of a key that says what its draws are for; see pipeline/masking.py."""
NOWHERE = -1
"""The position of a token that is none of its document's: [CLS] and [SEP]."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which tokens of which documents make the sequences; all int64 (S,)."""

    document_S: np.ndarray
    start_S: np.ndarray
    end_S: np.ndarray
    """Tokens [start, end) of the document."""
    pivot_S: np.ndarray
    """Where the second segment of a pair begins, in tokens of the document; 0 where the sequence is no pair."""
    label_S: np.ndarray
    """ORDERED, SWAPPED or NOT_APPLICABLE."""

    @property
    def length_S(self) -> np.ndarray:
        """Tokens with the special ones: [CLS] A [SEP], or [CLS] A [SEP] B [SEP] for a pair."""
        return self.end_S - self.start_S + 2 + (self.pivot_S > 0)


def cut(lengths_D: np.ndarray, max_tokens: int) -> Sequences:
    """Cut documents into sequences of at most `max_tokens`, special tokens included; only a document's last is shorter.

    For documents of 7 and 2 tokens and sequences of at most 5 there are [0, 3), [3, 6), [6, 7) and [0, 2).

    Args:
        lengths_D: tokens of each document; one of 0 tokens gives no sequence.
    """
    content = max_tokens - 2
    lengths_D = np.asarray(lengths_D, dtype=np.int64)
    count_D = -(-lengths_D // content)
    document_S = np.repeat(np.arange(len(lengths_D)), count_D)
    start_S = (np.arange(len(document_S)) - np.repeat(np.cumsum(count_D) - count_D, count_D)) * content
    end_S = np.minimum(start_S + content, lengths_D[document_S])
    return Sequences(document_S, start_S, end_S, np.zeros_like(start_S), np.full_like(start_S, NOT_APPLICABLE))


def cut_pairs(
    lengths_D: np.ndarray, max_tokens: int, keys_D: np.ndarray, sentences: np.ndarray, *ends: int
) -> Sequences:
    """Cut documents where sentences begin, and make pairs of what results: two segments of whole sentences, in every
    other pair the wrong way round, as in ALBERT (Lan et al., 2019).

    Where the second segment begins, and whether they are swapped, follows from the key of the document and the place of
    the sequence in it. A sequence of one sentence is no pair. Nor is one that begins or ends within a sentence too long
    for a sequence: swapped, half a sentence at its beginning would give away that it is not the beginning.

    Args:
        lengths_D: tokens of each document; one of 0 tokens gives no sequence.
        max_tokens: most tokens of a sequence, with [CLS] and two [SEP].
        keys_D: uint64 keys of the documents.
        sentences: ascending int64, where sentences begin in the tokens of all documents, laid end to end.
        ends: what the choices depend on beside: seed and epoch.
    """
    content = max_tokens - 3
    lengths_D = np.asarray(lengths_D, dtype=np.int64)
    first_D = np.cumsum(lengths_D) - lengths_D
    short = np.flatnonzero((lengths_D > 0) & (lengths_D <= content))
    pieces = [np.stack([short, first_D[short], first_D[short] + lengths_D[short]], axis=1)]
    for document in np.flatnonzero(lengths_D > content).tolist():
        bounds = sentence_bounds(int(first_D[document]), int(lengths_D[document]), content, sentences)
        pieces.append(np.stack([np.full(len(bounds) - 1, document), bounds[:-1], bounds[1:]], axis=1))
    # In the places of all documents laid end to end, until the end.
    document_S, start_S, end_S = sorted_rows(np.concatenate(pieces)).T
    last_S = first_D[document_S] + lengths_D[document_S]
    whole_S = begins(start_S, sentences) & ((end_S == last_S) | begins(end_S, sentences))
    low_S = np.searchsorted(sentences, start_S, side="right")
    count_S = np.where(whole_S, np.searchsorted(sentences, end_S, side="left") - low_S, 0)
    paired = np.flatnonzero(count_S > 0)
    start_S, end_S, shift_S = start_S - first_D[document_S], end_S - first_D[document_S], first_D[document_S]
    bits = draws(keys_of(key_of(PAIR, *ends), keys_D[document_S[paired]]), start_S[paired])
    pivot_S, label_S = np.zeros_like(document_S), np.full_like(document_S, NOT_APPLICABLE)
    pivot_S[paired] = sentences[low_S[paired] + below(bits, count_S[paired])] - shift_S[paired]
    label_S[paired] = np.where(bits & np.uint64(1), SWAPPED, ORDERED)
    return Sequences(document_S, start_S, end_S, pivot_S, label_S)


def sentence_bounds(first: int, length: int, content: int, sentences: np.ndarray) -> np.ndarray:
    """Where to cut tokens [first, first + length), both ends included: each piece as long as `content` allows if it is
    to end with a sentence; within one, where it is longer than that."""
    bounds = [first]
    while first + length - bounds[-1] > content:
        limit = bounds[-1] + content
        sentence = int(sentences[np.searchsorted(sentences, limit, side="right") - 1])
        bounds.append(sentence if sentence > bounds[-1] else limit)
    return np.array([*bounds, first + length])


def begins(places: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """For each place whether a sentence begins there."""
    return sentences[np.minimum(np.searchsorted(sentences, places), len(sentences) - 1)] == places


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of numbers by their first two columns."""
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def lay_out(
    sequences: Sequences, chosen: np.ndarray, tokens_D: Sequence[np.ndarray], *, cls_id: int, sep_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the tokens of the chosen sequences end to end, with their special tokens.

    Args:
        chosen: int64 indices of sequences, one or more.
        tokens_D: for each document its tokens.

    Returns:
        tokens_T int64; cu_seqlens int32 (chosen + 1,); positions_T int32, each token's in its document, NOWHERE for
        special ones.
    """
    lengths = sequences.length_S[chosen]
    cu_seqlens = np.zeros(len(chosen) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    tokens_T = np.full(cu_seqlens[-1], sep_id, dtype=np.int64)
    positions_T = np.full(cu_seqlens[-1], NOWHERE, dtype=np.int32)
    tokens_T[cu_seqlens[:-1]] = cls_id
    fields = (sequences.document_S, sequences.start_S, sequences.end_S, sequences.pivot_S, sequences.label_S)
    rows = zip(cu_seqlens[:-1].tolist(), *(values[chosen].tolist() for values in fields), strict=True)
    for at, document, start, end, pivot, label in rows:
        segments = [(start, end)] if not pivot else [(start, pivot), (pivot, end)]
        at += 1
        for first, last in reversed(segments) if label == SWAPPED else segments:
            tokens_T[at : at + last - first] = tokens_D[document][first:last]
            positions_T[at : at + last - first] = np.arange(first, last)
            at += last - first + 1
    return tokens_T, cu_seqlens, positions_T
