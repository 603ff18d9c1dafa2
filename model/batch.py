"""The one layout that the model accepts: many sequences laid end to end, with no padding between them.

Shape suffixes: T tokens of the whole batch, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Many sequences laid end to end, with no padding between them."""

    tokens_T: Tensor
    """int64 token ids."""
    cu_seqlens: Tensor
    """int32, S + 1 offsets; sequence i is tokens_T[cu_seqlens[i]:cu_seqlens[i + 1]]. Every sequence has a token or
    more.
    """
    max_seqlen: int
    """Length of the longest sequence, on the host, so that no kernel launch waits for the device."""
    offsets: tuple[int, ...] = ()
    """`cu_seqlens` once more, on the host: loops over sequences read it instead of waiting for the device."""

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.tokens_T.device

    def host_offsets(self) -> tuple[int, ...]:
        return self.offsets or tuple(self.cu_seqlens.tolist())

    def positions_T(self) -> Tensor:
        """Position of each token in its sequence, int64. For lengths 3 and 2: [0, 1, 2, 0, 1]."""
        lengths = self.cu_seqlens.diff()
        starts_T = torch.repeat_interleave(self.cu_seqlens[:-1].long(), lengths, output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=self.device) - starts_T

    def sequence_T(self) -> Tensor:
        """Index of the sequence that each token belongs to, int64. For lengths 3 and 2: [0, 0, 0, 1, 1]."""
        index_S = torch.arange(self.num_sequences, device=self.device)
        return torch.repeat_interleave(index_S, self.cu_seqlens.diff(), output_size=self.num_tokens)

    def to(self, device: torch.device | str) -> "PackedBatch":
        return PackedBatch(
            self.tokens_T.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.host_offsets(),
        )


def pack(sequences: Sequence[Sequence[int] | np.ndarray]) -> PackedBatch:
    """Lay sequences of token ids end to end.

    Args:
        sequences: at least one; each one-dimensional, with one token or more.

    Raises:
        ValueError: no sequence, or an empty one.
    """
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    if not arrays:
        raise ValueError("a packed batch needs at least one sequence")
    lengths = [a.size for a in arrays]
    if min(lengths) == 0:
        raise ValueError(f"sequence {lengths.index(0)} is empty; every sequence needs a token")
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return PackedBatch(
        torch.from_numpy(np.concatenate(arrays)), torch.from_numpy(offsets), max(lengths), tuple(offsets.tolist())
    )


def unpad(input_ids: Tensor, attention_mask: Tensor) -> tuple[PackedBatch, Tensor]:
    """Convert a Hugging Face user's padded batch, padding on either side.

    Args:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), non-zero for real tokens; each row has one or more.

    Returns:
        The packed batch, and the flat indices (T,) of its tokens in the padded batch, for `pad`.
    """
    real = attention_mask.bool()
    lengths = real.sum(dim=1).tolist()
    if min(lengths, default=0) == 0:
        raise ValueError("every row of attention_mask needs a real token")
    index_T = real.flatten().nonzero().squeeze(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    cu_seqlens = torch.from_numpy(offsets).to(input_ids.device)
    return PackedBatch(input_ids.flatten()[index_T], cu_seqlens, max(lengths), tuple(offsets.tolist())), index_T


def pad(values_TD: Tensor, index_T: Tensor, rows: int, length: int) -> Tensor:
    """Lay packed values (T, ...) back into a zero-padded (rows, length, ...) tensor; `index_T` as `unpad` gave it."""
    padded = values_TD.new_zeros(rows * length, *values_TD.shape[1:])
    padded[index_T] = values_TD
    return padded.view(rows, length, *values_TD.shape[1:])
