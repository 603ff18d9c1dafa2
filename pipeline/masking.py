"""Which tokens a model has to guess, and what it sees in their place: drawn anew in every epoch, from no state.

What happens to a token follows from (seed, epoch, document, its position in the document) alone, by the hash of
pipeline/permutation.py: so neither packing nor workers, cuts or restarts change a mask, and no two workers share a
stream. Special tokens are never chosen and never put in. Held-out text is masked the same in every epoch and every run.
"""

from dataclasses import dataclass

import numpy as np

from model.errors import InputError
from pipeline.permutation import below, draws, key_of, keys_of, mix64

HELD_OUT = -1
"""The epoch of masks that never change."""
CHOICE, REPLACEMENT = 1, 2
"""What a draw is for: a word of the key, so that draws for different ends have nothing to do with each other."""
LOW = np.uint64((1 << 32) - 1)


@dataclass(frozen=True, slots=True)
class MaskingConfig:
    """How many tokens are chosen, and what the model sees of them."""

    rate: float = 0.3
    """Share of the ordinary tokens that is chosen, 0 to 1."""
    final_rate: float | None = None
    """The share at the end of training, reached in a straight line; None: it stays."""
    mask_share: float = 0.8
    """Share of the chosen that is replaced by [MASK]."""
    random_share: float = 0.1
    """Share of the chosen that is replaced by a random ordinary token; what is left stays and is predicted too."""
    evaluation_rate: float = 0.3
    """The share for held-out text: of its own, so that losses compare over a schedule and between runs."""

    def __post_init__(self) -> None:
        named = {"rate": self.rate, "final_rate": self.final_rate, "evaluation_rate": self.evaluation_rate}
        named |= {"mask_share": self.mask_share, "random_share": self.random_share}
        for name, value in named.items():
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"masking: {name} is {value}; it must be from 0 to 1")
        if self.mask_share + self.random_share > 1:
            raise InputError(f"masking: mask_share {self.mask_share} and random_share {self.random_share} exceed 1")

    def rate_at(self, progress: float) -> float:
        """The rate when this share of training, 0 to 1, is done."""
        if self.final_rate is None:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * min(max(progress, 0.0), 1.0)


class Masker:
    """Masks the bins of one corpus.

    Args:
        seed: of the run; held-out masks do not depend on it.
        mask_id: the id of [MASK].
        special_ids: ids that are neither masked nor put in.
        vocab_size: ids run from 0 to this, exclusive.

    Raises:
        InputError: a vocabulary of nothing but special tokens.
    """

    def __init__(
        self, config: MaskingConfig, *, seed: int, mask_id: int, special_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        self.config, self.seed, self.mask_id = config, seed, mask_id
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[list(special_ids)] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        if not len(self.ordinary):
            raise InputError("the tokenizer has special tokens only; nothing can be masked")

    def __call__(
        self,
        tokens_T: np.ndarray,
        documents_S: np.ndarray,
        cu_seqlens: np.ndarray,
        positions_T: np.ndarray,
        *,
        epoch: int,
        rate: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose what is to be predicted.

        Args:
            tokens_T: int64 ids.
            documents_S: uint64 keys of the sequences' documents.
            cu_seqlens: (S + 1,) offsets of the sequences.
            positions_T: each token's position in its document; negative where it is no token of it.
            epoch: 0 upward, or HELD_OUT.
            rate: share to choose.

        Returns:
            The tokens as the model is to see them, int64 (T,), and the ascending indices of those to predict, int64
            (M,), in a bin of which M may be 0.
        """
        ends = (HELD_OUT,) if epoch == HELD_OUT else (self.seed, epoch)
        keys_T = np.repeat(keys_of(key_of(CHOICE, *ends), documents_S), np.diff(cu_seqlens))
        bits_T = draws(keys_T, positions_T)
        # The upper half of the bits decides whether, the lower half what is seen instead.
        chosen_T = (bits_T >> np.uint64(32)) < np.uint64(round(rate * 2**32))
        chosen_T &= (positions_T >= 0) & ~self.is_special[tokens_T]
        masked_M = np.flatnonzero(chosen_T)
        share_M = (bits_T[masked_M] & LOW) / 2.0**32
        seen_T = tokens_T.copy()
        seen_T[masked_M[share_M < self.config.mask_share]] = self.mask_id
        random = masked_M[
            (share_M >= self.config.mask_share) & (share_M < self.config.mask_share + self.config.random_share)
        ]
        seen_T[random] = self.ordinary[
            below(mix64(bits_T[random] ^ np.uint64(key_of(REPLACEMENT))), len(self.ordinary))
        ]
        return seen_T, masked_M
