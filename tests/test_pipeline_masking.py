"""Masks: as many as asked for, never a special token, and a function of where a token stands, of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.masking import HELD_OUT, Masker, MaskingConfig

SPECIAL = (0, 1, 2, 3, 4, 77)
MASK, VOCAB = 4, 500


def masker(config: MaskingConfig = MaskingConfig(), seed: int = 0) -> Masker:  # noqa: B008 (frozen)
    return Masker(config, seed=seed, mask_id=MASK, special_ids=SPECIAL, vocab_size=VOCAB)


def one_sequence(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, offsets and positions of [CLS], `length` tokens of text (some of them special), [SEP]."""
    text = np.random.default_rng(seed).integers(0, VOCAB, length)
    tokens = np.concatenate([[2], text, [3]])
    return tokens, np.array([0, length + 2]), np.concatenate([[-1], np.arange(length), [-1]])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**63), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_rates_are_within_binomial_bounds(rate: float, mask: float, rest: float, seed: int, epoch: int) -> None:
    config = MaskingConfig(mask_share=mask, random_share=(1 - mask) * rest)
    tokens, cu_seqlens, positions = one_sequence(20_000)
    seen, chosen = masker(config, seed)(tokens, np.array([9], np.uint64), cu_seqlens, positions, epoch=epoch, rate=rate)
    ordinary = np.isin(tokens, SPECIAL, invert=True) & (positions >= 0)
    kept = (1 - mask) * (1 - rest)
    same = kept + (1 - mask - kept) / (VOCAB - len(SPECIAL))
    for count, of, share in (
        (len(chosen), ordinary.sum(), rate),
        ((seen[chosen] == MASK).sum(), len(chosen), mask),
        ((seen[chosen] == tokens[chosen]).sum(), len(chosen), same),
    ):
        # Six standard deviations, and six for the skew where next to nothing is expected: no failure in 10^8 draws.
        assert abs(count - of * share) <= 6 * np.sqrt(of * share * (1 - share)) + 6
    assert ordinary[chosen].all(), "special tokens are never chosen"
    untouched = np.ones(len(tokens), dtype=bool)
    untouched[chosen] = False
    assert np.array_equal(seen[untouched], tokens[untouched])
    assert not np.isin(seen[chosen][seen[chosen] != MASK], SPECIAL).any(), "nor put in"


def test_random_tokens_are_all_ordinary_ones() -> None:
    tokens, cu_seqlens, positions = one_sequence(60_000)
    config = MaskingConfig(mask_share=0, random_share=1)
    seen, chosen = masker(config)(tokens, np.array([9], np.uint64), cu_seqlens, positions, epoch=0, rate=1.0)
    counts = np.bincount(seen[chosen], minlength=VOCAB)
    assert not counts[list(SPECIAL)].any()
    ordinary = np.delete(counts, SPECIAL)
    assert ordinary.min() > 0.5 * ordinary.mean()
    assert ordinary.max() < 1.5 * ordinary.mean()


def test_a_mask_follows_from_seed_epoch_document_and_position() -> None:
    """Whatever else is in the bin, wherever the document was cut: the same tokens are masked in the same way."""
    tokens, cu_seqlens, positions = one_sequence(3000)
    key = np.array([123456789], np.uint64)

    def masks(seed: int = 0, epoch: int = 5, key: np.ndarray = key, rate: float = 0.3) -> np.ndarray:
        seen, chosen = masker(seed=seed)(tokens, key, cu_seqlens, positions, epoch=epoch, rate=rate)
        return np.stack([np.isin(np.arange(len(tokens)), chosen), seen])

    alone = masks()
    # The second half of the document as a sequence of its own, behind another document's.
    other = np.random.default_rng(1).integers(5, 70, 100)
    half = np.concatenate([other, [2], tokens[1501:]])
    places = np.concatenate([np.arange(100), [-1], positions[1501:]])
    keys = np.array([5, 123456789], np.uint64)
    seen, chosen = masker()(half, keys, np.array([0, 100, len(half)]), places, epoch=5, rate=0.3)
    assert np.array_equal(seen[101:], alone[1, 1501:])
    assert np.array_equal(np.isin(np.arange(101, len(half)), chosen), alone[0, 1501:])
    # Anything else that changes gives a mask that has no more in common with it than chance has: 0.09 of the tokens.
    for different in (masks(seed=1), masks(epoch=6), masks(key=key + np.uint64(1))):
        assert np.mean(alone[0] & different[0]) == pytest.approx(0.09, abs=0.03)
    # A lower rate masks some of the same tokens.
    fewer = masks(rate=0.1)[0].astype(bool)
    assert alone[0][fewer].all()
    assert 0 < fewer.sum() < alone[0].sum() / 2


def test_held_out_masks_depend_on_the_document_alone() -> None:
    tokens, cu_seqlens, positions = one_sequence(1000)
    given = [
        masker(seed=seed)(tokens, np.array([9], np.uint64), cu_seqlens, positions, epoch=HELD_OUT, rate=0.3)
        for seed in (0, 1)
    ]
    assert np.array_equal(given[0][0], given[1][0])
    assert np.array_equal(given[0][1], given[1][1])


def test_the_rate_goes_in_a_straight_line() -> None:
    config = MaskingConfig(rate=0.3, final_rate=0.1)
    assert [config.rate_at(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert MaskingConfig(rate=0.3).rate_at(0.9) == 0.3


def test_shares_that_cannot_be_are_one_line() -> None:
    with pytest.raises(InputError, match=r"rate is 1\.5; it must be from 0 to 1"):
        MaskingConfig(rate=1.5)
    with pytest.raises(InputError, match="exceed 1"):
        MaskingConfig(mask_share=0.8, random_share=0.3)
    with pytest.raises(InputError, match="special tokens only"):
        Masker(MaskingConfig(), seed=0, mask_id=0, special_ids=(0, 1), vocab_size=2)
