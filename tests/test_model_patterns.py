"""Masks by hand, and global tokens in every back-end that knows them: forward, gradients, reach, isolation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_attention import BORDERS, LENGTHS, assert_agrees, devices, random_inputs, run

from model.attention import prepare
from model.batch import pack
from model.config import QUERY_BLOCK
from model.patterns import Pattern, first_tokens, visible

GLOBAL = [Pattern(w, causal, g) for w, g in ((0, 1), (1, 40), (8, 3), (64, 1), (64, 130)) for causal in (False, True)]


def test_visible_draws_the_mask() -> None:
    mask = visible(pack([[1] * 3, [1]]), Pattern(1))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_visible_draws_global_tokens() -> None:
    batch = pack([[1] * 4, [1] * 2])
    drawn = [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    drawn += [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert visible(batch, Pattern(0, num_global=1)).int().tolist() == drawn
    causal = [[int(bool(seen) and j <= i) for j, seen in enumerate(row)] for i, row in enumerate(drawn)]
    assert visible(batch, Pattern(0, True, 1)).int().tolist() == causal


@devices
@pytest.mark.parametrize("pattern", GLOBAL, ids=str)
def test_global_tokens_agree_with_reference(device: str, pattern: Pattern) -> None:
    assert_agrees("blocks", *random_inputs(LENGTHS, device), pattern)


@given(
    lengths=st.lists(st.one_of(st.sampled_from(BORDERS), st.integers(1, 120)), min_size=1, max_size=5).map(tuple),
    window=st.integers(0, 90),
    num_global=st.integers(0, 100),
    causal=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_global_tokens_agree_on_any_lengths(
    lengths: tuple[int, ...], window: int, num_global: int, causal: bool
) -> None:
    assert_agrees("blocks", *random_inputs(lengths), Pattern(window, causal, num_global))


@pytest.mark.parametrize("j", [0, 2, 3, 60, 250, 299])
def test_what_a_global_token_reaches(j: int) -> None:
    """Token j of the middle document changes its neighbours and the first three, or all if it is one of them."""
    batch, qkv = random_inputs((90, 300, 70))
    pattern = Pattern(8, num_global=3)
    before = run("blocks", batch, qkv, pattern)
    qkv[2, 90 + j] += 100
    rows = (run("blocks", batch, qkv, pattern) != before).flatten(1).any(dim=1).nonzero().flatten() - 90
    assert rows.tolist() == [i for i in range(300) if abs(i - j) <= 8 or i < 3 or j < 3]


def test_no_global_token_changes_no_bit() -> None:
    batch, qkv = random_inputs(LENGTHS)
    assert torch.equal(run("blocks", batch, qkv, Pattern(8, num_global=0)), run("blocks", batch, qkv, Pattern(8)))
    assert prepare("blocks", batch, Pattern(8), dtype=qkv.dtype).bias.shape[-1] == QUERY_BLOCK + 2 * 8
    assert prepare("blocks", batch, Pattern(8, num_global=2), dtype=qkv.dtype).bias.shape[-1] == QUERY_BLOCK + 2 * 8 + 2


def test_first_tokens_are_those_of_the_sequence_that_began_before_the_window() -> None:
    batch = pack([[1] * 40, [1] * 30])
    tokens, seen = first_tokens(batch, 2, window=10)
    assert tokens.tolist() == [[0, 1], [0, 1], [40, 41]]
    assert seen.tolist() == [[False, False], [True, True], [True, True]]
    assert first_tokens(batch, 2, window=23)[1].tolist() == [[False, False], [True, True], [True, False]]


def test_what_cannot_matter_is_left_out() -> None:
    assert Pattern(64, num_global=3).settled(65) == Pattern()
    assert Pattern(64, True, 3).settled(66) == Pattern(64, True, 3)
    assert Pattern(num_global=3).settled(10_000) == Pattern()
    assert Pattern(num_global=3, key_blocks=4).settled(256) == Pattern()
    assert Pattern(num_global=3, key_blocks=4).settled(257) == Pattern(num_global=3, key_blocks=4)


@pytest.mark.parametrize("backend", ["native", "varlen", "xformers"])
@pytest.mark.parametrize("pattern", [Pattern(64, num_global=1), Pattern(key_blocks=1)], ids=str)
def test_other_backends_leave_it_to_blocks(backend: str, pattern: Pattern) -> None:
    batch, qkv = random_inputs((300, 5))
    with torch.no_grad():
        assert prepare(backend, batch, pattern, dtype=qkv.dtype).backend == "blocks"
