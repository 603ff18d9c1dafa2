"""Cutting long documents: windows that the encoder can see, and chunks that get a vector of their own.

Plain numpy over all documents of a table at once; windows are counted in tokens, chunks end with a paragraph or a
sentence where one ends in the last third of their length. Suffixes: U units, W windows, N tokens, C chunks.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from model.errors import InputError

WHOLE = -1
"""The `chunk` of a vector that stands for the whole document."""

# A heading or a blank line; a full stop, question or exclamation mark with what closes it; the wide marks of Chinese
# and Japanese, which no space follows; the end of a line. "e.g. this" is no end: a small letter follows.
PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*|\n(?=#{1,6} )")
SENTENCE = re.compile(
    r"[.!?\u2026][\"'\u201d\u2019)\]]*\s+(?![a-z])|[\u3002\uff01\uff1f][\"'\u201d\u2019\u300d\u300f)]*"
)
LINE = re.compile(r"\n")
SPACES = np.array([9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x3000])


@dataclass(frozen=True, slots=True)
class ChunkingConfig:
    """Which vectors a document gets, and what happens to a long one."""

    granularity: Literal["document", "chunk", "both"] = "document"
    chunk_tokens: int = 256
    """Most tokens of a chunk; it has at least a third as many unless the document is shorter."""
    context: Literal["late", "none"] = "late"
    """late: chunks are pooled after their whole window was encoded; none: each is encoded alone."""
    overlap_tokens: int | None = None
    """Least number of tokens that neighbouring windows share; None: an eighth of `max_tokens`."""
    max_tokens: int | None = None
    """Longest sequence, special tokens and prompt included; None: the model's."""
    long_documents: Literal["window", "truncate"] = "window"

    @property
    def chunked(self) -> bool:
        return self.granularity != "document"

    def settle(self, model_max_tokens: int, num_prompt_tokens: int = 0) -> "ChunkingConfig":
        """Fill in what depends on the model.

        Raises:
            InputError: a length that the model cannot take, or lengths that contradict each other.
        """
        longest = model_max_tokens if self.max_tokens is None else self.max_tokens
        if longest > model_max_tokens:
            raise InputError(f"max_tokens is {longest}, the model takes {model_max_tokens}; lower it or leave it out")
        content = longest - 2 - num_prompt_tokens
        if content < 2:
            raise InputError(
                f"max_tokens {longest} leaves no room beside 2 special and {num_prompt_tokens} prompt tokens"
            )
        overlap = min(longest // 8, content // 2) if self.overlap_tokens is None else self.overlap_tokens
        if not 0 <= overlap <= content // 2:
            raise InputError(f"overlap_tokens is {overlap}; it may be at most half of a window's {content} tokens")
        if self.chunked and not 1 <= self.chunk_tokens <= content:
            raise InputError(f"chunk_tokens is {self.chunk_tokens}; it may be at most {content}, what a window holds")
        return replace(self, max_tokens=longest, overlap_tokens=overlap)


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over units (documents, or chunks encoded alone), in the order of the units; all arrays (W,) int64."""

    unit: np.ndarray
    """Index of the unit that the window is cut from."""
    start: np.ndarray
    end: np.ndarray
    """Content tokens of the unit that the encoder sees, [start, end)."""
    keep_start: np.ndarray
    keep_end: np.ndarray
    """Content tokens whose vectors are taken from this window. Those of a unit's windows tile the unit."""


def plan_windows(lengths_U: np.ndarray, content_tokens_U: np.ndarray | int, overlap_tokens: int) -> Windows:
    """Cut units into as few windows as their overlap allows, all windows of a unit equally long.

    A token in an overlap is kept from the window whose nearer edge is farther away: overlaps are split in the middle.
    For 10 tokens in windows of at most 6 with overlap 2 the windows are [0, 6) and [4, 10), kept [0, 5) and [5, 10).

    Args:
        lengths_U: content tokens of each unit, 0 or more.
        content_tokens_U: most content tokens of a window, one number or one for each unit; over 2 * overlap_tokens - 1.
        overlap_tokens: least overlap of neighbours.
    """
    n_U = np.asarray(lengths_U, dtype=np.int64)
    budget_U = np.broadcast_to(np.asarray(content_tokens_U, dtype=np.int64), n_U.shape)
    count_U = np.where(n_U <= budget_U, 1, -((overlap_tokens - n_U) // (budget_U - overlap_tokens)))
    # Even lengths: the same total as a fixed stride, but no stump at the end that has lost its context.
    length_U = -(-(n_U + (count_U - 1) * overlap_tokens) // count_U)
    unit = np.repeat(np.arange(len(n_U)), count_U)
    first_U = np.cumsum(count_U) - count_U
    i_W = np.arange(len(unit)) - first_U[unit]
    start = i_W * (n_U - length_U)[unit] // np.maximum(count_U[unit] - 1, 1)
    end = start + length_U[unit]
    keep_start = start.copy()
    inner = np.flatnonzero(i_W > 0)
    keep_start[inner] = (start[inner] + end[inner - 1]) // 2
    keep_end = end.copy()
    keep_end[inner - 1] = keep_start[inner]
    return Windows(unit, start, end, keep_start, keep_end)


def boundary_ranks(text: str, starts_N: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """How good a place to cut stands before each token, uint8 (N,).

    4 a paragraph or heading begins, 3 a sentence, 2 a line, 1 a word; 0 inside a word; and 0 inside a character that
    several tokens share.

    Args:
        starts_N, ends_N: character offsets of the tokens, ascending; a space before a word may belong to its token.
    """
    ranks_N = np.zeros(len(starts_N), dtype=np.uint8)
    if not len(starts_N):
        return ranks_N
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    space = np.zeros(len(codes) + 1, dtype=bool)
    small = codes < 0x3001
    table = np.zeros(0x3001, dtype=bool)
    table[SPACES] = True
    space[:-1][small] = table[codes[small]]
    ranks_N[space[starts_N] | space[np.maximum(starts_N - 1, 0)]] = 1
    for rank, pattern in ((2, LINE), (3, SENTENCE), (4, PARAGRAPH)):
        places = np.fromiter((match.end() for match in pattern.finditer(text)), dtype=np.int64)
        # The token that covers the place, whether or not the space before it is part of the token.
        at = np.searchsorted(ends_N, places, side="right")
        at = at[at < len(ranks_N)]
        ranks_N[at] = np.maximum(ranks_N[at], rank)
    ranks_N[1:][starts_N[1:] < ends_N[:-1]] = 0
    return ranks_N


def chunk_starts(ranks_N: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """First token of each chunk, int64 (C,), the first 0.

    Each chunk ends at the best place in the last third of `chunk_tokens`: the last one of the highest rank, or at
    the limit where there is none. What is left over a chunk but under one and a third is cut near its middle, so
    that no stump remains. A document without tokens is one chunk.
    """
    n = len(ranks_N)
    places = [np.flatnonzero(ranks_N >= rank) for rank in (4, 3, 2, 1)]
    starts = [0]
    while (left := n - starts[-1]) > chunk_tokens:
        at = starts[-1]
        if left * 3 < chunk_tokens * 4:
            low, high, limit = at + -(-left // 3), at + left * 2 // 3, at + -(-left // 2)
        else:
            low, high, limit = at + -(-chunk_tokens * 2 // 3), at + chunk_tokens, at + chunk_tokens
        cut = limit
        for candidates in places:
            last = int(np.searchsorted(candidates, high, side="right")) - 1
            if last >= 0 and candidates[last] >= low:
                cut = int(candidates[last])
                break
        starts.append(max(cut, at + 1))
    return np.array(starts, dtype=np.int64)


def chunk_spans(text: str, offsets_N2: np.ndarray, chunk_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut one document into chunks.

    Args:
        offsets_N2: (N, 2) character offsets of its tokens.

    Returns:
        Token bounds and character bounds, int64 (C + 1,) each: chunk c is tokens [bounds[c], bounds[c + 1]). Both
        tile the document: the first bound is 0, the last the number of tokens, or of characters.
    """
    starts_N = np.maximum.accumulate(offsets_N2[:, 0]) if len(offsets_N2) else np.empty(0, np.int64)
    ends_N = np.maximum.accumulate(offsets_N2[:, 1]) if len(offsets_N2) else np.empty(0, np.int64)
    starts = chunk_starts(boundary_ranks(text, starts_N, ends_N), chunk_tokens)
    chars = starts_N[starts[1:]] if len(starts_N) else starts[1:]
    return np.append(starts, len(starts_N)), np.concatenate([[0], chars, [len(text)]])
