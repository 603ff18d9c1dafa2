"""Selective sparse attention against the same selection as a dense mask: forward, gradients, isolation; and what is
selected, by hand.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_attention import (
    HEAD_SIZE,
    HEADS,
    LENGTHS,
    assert_agrees,
    devices,
    forward_and_gradient,
    random_inputs,
    run,
)
from torch import Tensor

from model import sparse
from model.attention import prepare
from model.patterns import Pattern
from model.sparse import select, selected_mask


def by_hand(q: Tensor, k: Tensor, key_blocks: int, block_size: int, num_global: int) -> list[list[list[int]]]:
    """For (L, N, H): the selected blocks of every head and block, by loops over the definition."""
    chosen: list[list[list[int]]] = []
    for n in range(q.shape[1]):
        queries, keys = ([x.mean(dim=0) for x in side[:, n].float().split(block_size)] for side in (q, k))
        chosen.append([])
        for c, query in enumerate(queries):
            always = {c, *range(-(-num_global // block_size))}
            others = sorted(set(range(len(keys))) - always, key=lambda j: (-float(query @ keys[j]), j))
            chosen[-1].append(sorted([*always, *others][:key_blocks] if key_blocks < len(keys) else range(len(keys))))
    return chosen


@given(
    length=st.integers(1, 70), key_blocks=st.integers(2, 6), block_size=st.integers(1, 9), num_global=st.integers(0, 1)
)
@settings(max_examples=50, deadline=None)
def test_the_best_blocks_are_selected(length: int, key_blocks: int, block_size: int, num_global: int) -> None:
    _, (q, k, _) = random_inputs((length,), seed=length)
    chosen = select(*(x[None].transpose(1, 2) for x in (q, k)), key_blocks, block_size, num_global)
    assert chosen[0].tolist() == by_hand(q, k, key_blocks, block_size, num_global)


def test_of_equal_scores_the_first_are_selected() -> None:
    zeros = torch.zeros(1, HEADS, 80, HEAD_SIZE)
    chosen = select(zeros, -zeros, 3, 8)[0, 0].tolist()
    assert chosen == [[0, 1, c] if c > 1 else [0, 1, 2] for c in range(10)]


def test_negative_scores_are_ordered() -> None:
    q, k = (
        torch.full((1, 1, 5, 2), 1.0),
        torch.tensor([-3.0, -1.0, -0.5, -2.0, 4.0])[None, None, :, None].expand(-1, -1, -1, 2),
    )
    assert select(q, k, 3, 1)[0, 0].tolist() == [[0, 2, 4], [1, 2, 4], [1, 2, 4], [2, 3, 4], [1, 2, 4]]


@devices
@pytest.mark.parametrize("num_global", [0, 20])
@pytest.mark.parametrize("block_size, key_blocks", [(8, 4), (16, 3), (64, 2)])
def test_selected_blocks_agree_with_reference(device: str, key_blocks: int, block_size: int, num_global: int) -> None:
    pattern = Pattern(num_global=num_global, key_blocks=key_blocks, block_size=block_size)
    assert_agrees("blocks", *random_inputs(LENGTHS, device), pattern)


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4).map(tuple),
    key_blocks=st.integers(2, 8),
    block_size=st.sampled_from([1, 7, 16, 32]),
    num_global=st.integers(0, 1),
)
@settings(max_examples=20, deadline=None)
def test_selected_blocks_agree_on_any_lengths(
    lengths: tuple[int, ...], key_blocks: int, block_size: int, num_global: int
) -> None:
    assert_agrees("blocks", *random_inputs(lengths), Pattern(None, False, num_global, key_blocks, block_size))


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several strips, and the sum of their gradients, are those of one."""
    batch, qkv = random_inputs((257, 100))
    pattern = Pattern(key_blocks=3, block_size=16)
    whole = forward_and_gradient("blocks", batch, qkv, pattern)
    monkeypatch.setattr(sparse, "GATHERED", 5 * 3 * 16 * HEAD_SIZE)
    for one, other in zip(whole, forward_and_gradient("blocks", batch, qkv, pattern), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_all_blocks_are_full_attention_to_the_bit() -> None:
    batch, qkv = random_inputs(LENGTHS)
    longest = -(-max(LENGTHS) // 16)
    full = run("blocks", batch, qkv, Pattern())
    for blocks in (longest, longest + 1):
        assert torch.equal(run("blocks", batch, qkv, Pattern(key_blocks=blocks, block_size=16)), full)
    assert not torch.equal(run("blocks", batch, qkv, Pattern(key_blocks=longest - 1, block_size=16)), full)
    mask = selected_mask(*qkv[:2], batch.host_offsets(), longest, 16)
    assert torch.equal(mask.sum(dim=(1, 2)), torch.full((HEADS,), sum(n * n for n in LENGTHS)))


def test_a_token_reaches_the_blocks_that_selected_it() -> None:
    batch, qkv = random_inputs((40, 160, 30))
    pattern = Pattern(None, False, 2, 3, 16)
    chosen = select(*(x[None, 40:200].transpose(1, 2) for x in qkv[:2]), 3, 16, 2)[0]
    before = run("blocks", batch, qkv, pattern)
    for j in (0, 1, 20, 100, 159):
        changed = qkv.clone()
        changed[2, 40 + j] += 100
        differs = (run("blocks", batch, changed, pattern) != before).any(dim=2)
        for n in range(HEADS):
            sees = [i for i in range(160) if i < 2 or j // 16 in chosen[n, i // 16]]
            assert (differs[:, n].nonzero().flatten() - 40).tolist() == sees


def test_documents_are_isolated_and_company_changes_nothing() -> None:
    lengths = (100, 1, 64, 129)
    batch, qkv = random_inputs(lengths)
    pattern = Pattern(key_blocks=2, block_size=16)
    before = run("blocks", batch, qkv, pattern)
    for start, stop in zip(batch.host_offsets(), batch.host_offsets()[1:], strict=False):
        changed = qkv.clone()
        changed[:, start:stop] = 50 * torch.randn_like(changed[:, start:stop])
        others = torch.ones(batch.num_tokens, dtype=torch.bool)
        others[start:stop] = False
        assert torch.equal(run("blocks", batch, changed, pattern)[others], before[others])
        alone, _ = random_inputs((stop - start,))
        torch.testing.assert_close(run("blocks", alone, qkv[:, start:stop], pattern), before[start:stop])
        leaf = qkv.clone().requires_grad_()
        run("blocks", batch, leaf, pattern)[start:stop].sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[:, others].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_narrow_types_stay_near(dtype: torch.dtype) -> None:
    batch, qkv = random_inputs((200, 77), dtype=dtype)
    assert_agrees("blocks", batch, qkv, Pattern(key_blocks=3, block_size=16))


def test_a_decoder_may_not_select() -> None:
    for pattern in ({"causal": True}, {"window": 8}):
        with pytest.raises(AssertionError):
            Pattern(key_blocks=2, **pattern)
    batch, qkv = random_inputs((5,))
    assert prepare("blocks", batch, Pattern(key_blocks=2), dtype=qkv.dtype).pattern == Pattern()
