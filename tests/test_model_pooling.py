"""Pooling over ranges of a packed batch, against a Python loop, and by parts against whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import PackedBatch, pack
from model.pooling import POOLING_MODES, encode_pooled, normalize, pool_segments

HIDDEN = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHT_OF = {
    "mean": lambda i, n: 1,
    "cls": lambda i, n: int(i == 0),
    "last": lambda i, n: int(i == n - 1),
    "weighted_mean": lambda i, n: i + 1,
}
ranges = st.lists(
    st.tuples(st.integers(0, 39), st.integers(1, 12)).map(lambda r: (r[0], min(r[0] + r[1], 40))),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("mode", POOLING_MODES)
@given(spans=ranges)
@settings(deadline=None)
def test_every_mode_is_a_weighted_sum(mode: str, spans: list[tuple[int, int]]) -> None:
    """Ranges overlap and come in any order."""
    starts, ends = (torch.tensor(column) for column in zip(*spans))
    sums, weights = pool_segments(HIDDEN, starts, ends, mode)
    for r, (start, end) in enumerate(spans):
        by_hand = [WEIGHT_OF[mode](i, end - start) for i in range(end - start)]
        assert weights[r] == sum(by_hand)
        expected = sum(w * HIDDEN[start + i] for i, w in enumerate(by_hand))
        torch.testing.assert_close(sums[r], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_float32(mode: str, dtype: torch.dtype) -> None:
    """A thousand ones in bfloat16 would add up to 256."""
    sums, weights = pool_segments(torch.ones(1000, 2, dtype=dtype), torch.tensor([0]), torch.tensor([1000]), mode)
    assert sums.dtype == weights.dtype == torch.float32
    assert torch.equal(sums[0] / weights[0], torch.ones(2))


def test_a_mean_by_windows_is_the_mean_of_the_whole() -> None:
    starts, ends = torch.tensor([0, 13, 14, 0]), torch.tensor([13, 14, 40, 40])
    sums, weights = pool_segments(HIDDEN, starts, ends, "mean")
    torch.testing.assert_close(sums[:3].sum(0) / weights[:3].sum(), HIDDEN.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(sums[3] / weights[3], HIDDEN.mean(0), rtol=0, atol=1e-14)


def sequences(*lengths: int) -> PackedBatch:
    return pack([[0] * length for length in lengths])


def test_one_vector_a_sequence() -> None:
    """An encoder is asked for all of its tokens or, where one stands for a sequence, for these only."""
    asked: list[list[int] | None] = []

    def encoder(batch: PackedBatch, select_M: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(None if select_M is None else select_M.tolist())
        return HIDDEN if select_M is None else HIDDEN[select_M]

    vectors = encode_pooled(encoder, sequences(1, 29, 10), "mean")
    assert vectors.shape == (3, 6)
    torch.testing.assert_close(vectors[1], HIDDEN[1:30].mean(0))
    assert torch.equal(encode_pooled(encoder, sequences(1, 29, 10), "cls"), HIDDEN[[0, 1, 30]])
    assert torch.equal(encode_pooled(encoder, sequences(1, 29, 10), "last"), HIDDEN[[0, 29, 39]])
    assert asked == [None, [0, 1, 30], [0, 29, 39]]


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_gradient(mode: str) -> None:
    hidden = HIDDEN.clone().requires_grad_()
    starts, ends = torch.tensor([0, 5, 6]), torch.tensor([5, 6, 40])
    assert torch.autograd.gradcheck(lambda x: pool_segments(x, starts, ends, mode)[0], (hidden,))


def test_unit_length_and_zero() -> None:
    unit = normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert unit.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown pooling mode 'max'; known are mean"):
        pool_segments(HIDDEN, torch.tensor([0]), torch.tensor([1]), "max")
