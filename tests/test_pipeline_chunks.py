"""Windows keep every token once, where it has most context; chunks tile the document and end where sentences do."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.chunks import ChunkingConfig, boundary_ranks, chunk_spans, chunk_starts, plan_windows

SENTENCE = "The clock struck three and nothing was lost. "


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int, int]:
    content = draw(st.integers(2, 60))
    return draw(st.lists(st.integers(0, 400), max_size=8)), content, draw(st.integers(0, content // 2))


@given(cuts())
def test_windows_keep_every_token_once(case: tuple[list[int], int, int]) -> None:
    lengths, content, overlap = case
    w = plan_windows(np.array(lengths, int), content, overlap)
    for unit, n in enumerate(lengths):
        mine = np.flatnonzero(w.unit == unit)
        assert len(mine) >= 1
        assert (w.end[mine] - w.start[mine] <= content).all()
        assert w.start[mine[0]] == 0
        assert w.end[mine[-1]] == n
        assert np.concatenate([np.arange(w.keep_start[i], w.keep_end[i]) for i in mine]).tolist() == list(range(n))
        assert (w.start[mine] <= w.keep_start[mine]).all()
        assert (w.keep_end[mine] <= w.end[mine]).all()
        if len(mine) > 1:
            assert (w.end[mine[:-1]] - w.start[mine[1:]] >= overlap).all()
            # No fewer windows would do, and all are equally long.
            assert (len(mine) - 1) * (content - overlap) + overlap < n
            assert len(set((w.end[mine] - w.start[mine]).tolist())) == 1


@given(cuts())
def test_a_token_is_kept_where_its_context_is_largest(case: tuple[list[int], int, int]) -> None:
    lengths, content, overlap = case
    w = plan_windows(np.array(lengths, int), content, overlap)
    for unit, n in enumerate(lengths):
        mine = [i for i in range(len(w.unit)) if w.unit[i] == unit]

        def context(i: int, token: int, n: int = n) -> float:
            left = np.inf if w.start[i] == 0 else token - w.start[i]
            right = np.inf if w.end[i] == n else w.end[i] - 1 - token
            return min(left, right)

        for i in mine:
            for token in range(w.keep_start[i], w.keep_end[i]):
                others = [context(j, token) for j in mine if w.start[j] <= token < w.end[j]]
                assert context(i, token) >= max(others) - 1


def test_worked_example() -> None:
    w = plan_windows(np.array([10, 0, 6]), 6, 2)
    assert [x.tolist() for x in (w.unit, w.start, w.end, w.keep_start, w.keep_end)] == [
        [0, 0, 1, 2],
        [0, 4, 0, 0],
        [6, 10, 0, 6],
        [0, 5, 0, 0],
        [5, 10, 0, 6],
    ]


@given(st.lists(st.integers(0, 4), max_size=300), st.integers(1, 50))
def test_chunks_tile_and_keep_their_length(ranks: list[int], chunk_tokens: int) -> None:
    ranks_N = np.array(ranks, np.uint8)
    bounds = np.append(chunk_starts(ranks_N, chunk_tokens), len(ranks))
    assert bounds[0] == 0
    lengths = np.diff(bounds)
    assert (lengths <= chunk_tokens).all()
    if ranks:
        assert (lengths >= 1).all()
    if len(ranks) > chunk_tokens:
        assert (lengths * 3 >= chunk_tokens).all()
    for end in bounds[1:-2]:  # all but the last two chunks, which may share a rest
        start = bounds[np.searchsorted(bounds, end) - 1]
        low = start + -(-chunk_tokens * 2 // 3)
        best = ranks_N[low : start + chunk_tokens + 1].max(initial=0)
        assert ranks_N[end] == best or end == start + 1


@given(st.text(st.sampled_from("ab.! \n#\u3002\u00e9\U0001f600"), max_size=200), st.integers(1, 12), st.integers(1, 4))
def test_characters_tile_too(text: str, chunk_tokens: int, width: int) -> None:
    starts = np.arange(0, len(text), width)
    offsets = np.stack([starts, np.minimum(starts + width, len(text))], axis=1)
    tokens, chars = chunk_spans(text, offsets, chunk_tokens)
    assert (tokens[0], tokens[-1]) == (0, len(offsets))
    assert (chars[0], chars[-1]) == (0, len(text))
    assert (np.diff(chars) >= 0).all()
    assert chars[1:-1].tolist() == offsets[tokens[1:-1], 0].tolist()


def words_of(text: str, *, space_first: bool) -> np.ndarray:
    """Offsets of words as tokens, with the space before them or without."""
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or text[i].isspace()]
    starts = [0, *ends[:-1]]
    if not space_first:
        starts = [s + (len(text[s:e]) - len(text[s:e].lstrip())) for s, e in zip(starts, ends, strict=True)]
    return np.array(list(zip(starts, ends, strict=True)))


@pytest.mark.parametrize("space_first", [True, False])
def test_chunks_end_with_sentences_and_rather_with_paragraphs(space_first: bool) -> None:
    text = (SENTENCE * 12 + "\n\n") * 2
    offsets = words_of(text.rstrip(), space_first=space_first)
    _, chars = chunk_spans(text.rstrip(), offsets, 30)
    parts = [text[a:b].strip() for a, b in itertools.pairwise(chars)]
    assert all(part.endswith("lost.") and part.startswith("The") for part in parts)


def test_ranks() -> None:
    text = "One e.g. two. Three\n# Four\nfive"
    offsets = words_of(text, space_first=False)
    assert [text[a:b] for a, b in offsets] == ["One", "e.g.", "two.", "Three", "#", "Four", "five"]
    assert boundary_ranks(text, offsets[:, 0], offsets[:, 1]).tolist() == [0, 1, 1, 3, 4, 1, 2]


def test_no_cut_inside_a_character_that_tokens_share() -> None:
    text = "\U0001f600" * 10
    offsets = np.repeat(np.arange(10), 4)[:, None] + np.array([0, 1])
    ranks = boundary_ranks(text, offsets[:, 0], offsets[:, 1])
    assert not ranks[np.arange(40) % 4 != 0].any()


def test_settle() -> None:
    settled = ChunkingConfig().settle(512)
    assert (settled.max_tokens, settled.overlap_tokens) == (512, 64)
    assert settled.settle(512) == settled
    for wrong in (
        ChunkingConfig(max_tokens=513),
        ChunkingConfig(overlap_tokens=300),
        ChunkingConfig(overlap_tokens=-1),
        ChunkingConfig(granularity="chunk", chunk_tokens=511),
    ):
        with pytest.raises(InputError, match="tokens is"):
            wrong.settle(512)
    with pytest.raises(InputError, match="no room"):
        ChunkingConfig().settle(16, num_prompt_tokens=13)


def test_a_long_document_takes_linear_time() -> None:
    def seconds(repeats: int) -> float:
        text = SENTENCE * repeats
        offsets = np.arange(0, len(text) - 4, 4)[:, None] + np.array([0, 4])
        begun = time.perf_counter()
        chunk_spans(text, offsets, 256)
        return time.perf_counter() - begun

    seconds(100)
    small, large = (min(seconds(n) for _ in range(3)) for n in (5_000, 100_000))  # 0.2 and 4.5 MB
    assert large < 100 * small + 1  # quadratic would be 400
