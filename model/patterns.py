"""Which keys a query sees inside its own sequence: as a pattern, written out, and as masks over blocks of queries.

Nothing here computes attention (`model.attention`) or selects blocks by what is in them (`model.sparse`). Shape
suffixes: T tokens, B query block, K key block, C blocks, G global tokens.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import PackedBatch
from model.config import QUERY_BLOCK

ROW_VALUES = 8
"""A row of a bias begins at a multiple of so many values: xformers' kernel reads 16 bytes at a time and refuses other
strides, such as the 158 columns of a decoder's window of 64 keys."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query sees inside its own sequence."""

    window: int | None = None
    """None sees everything; w sees |i - j| <= w."""
    causal: bool = False
    """Only j <= i."""
    num_global: int = 0
    """The first so many tokens of a sequence see, and are seen by, all of it, whatever the window."""
    key_blocks: int | None = None
    """None sees every block of keys; k sees the k best for each block of queries (see `model.sparse`)."""
    block_size: int = 64
    """Tokens of such a block."""

    def __post_init__(self) -> None:
        # What is selected for a block of queries depends on all of them: an earlier one would learn of a later one.
        assert self.key_blocks is None or (self.window is None and not self.causal)

    def settled(self, longest: int) -> "Pattern":
        """The same pattern without what cannot matter to sequences of at most `longest` tokens: cheaper kernels do."""
        window = None if self.window is None or longest <= self.window + 1 else self.window
        key_blocks = self.key_blocks
        if key_blocks is not None and longest <= key_blocks * self.block_size:
            key_blocks = None
        if window is None and key_blocks is None:
            return Pattern(causal=self.causal)
        return replace(self, window=window, key_blocks=key_blocks)


def visible(batch: PackedBatch, pattern: Pattern) -> Tensor:
    """The (T, T) mask written out: True where the query of the row sees the key of the column.

    Blocks of keys are not selected yet: that takes queries and keys.
    """
    sequence_T, position_T = batch.sequence_T(), batch.positions_T()
    distance_TT = position_T[:, None] - position_T[None, :]
    mask_TT = sequence_T[:, None] == sequence_T[None, :]
    if pattern.window is not None:
        near_TT = distance_TT.abs() <= pattern.window
        first_T = position_T < pattern.num_global
        mask_TT &= near_TT | first_T[:, None] | first_T
    if pattern.causal:
        mask_TT &= distance_TT >= 0
    return mask_TT


def window_bias(batch: PackedBatch, pattern: Pattern, dtype: torch.dtype) -> Tensor | None:
    """Additive mask (C, 1, B, K) for blocks of B consecutive tokens of the batch, whatever sequences they belong to.

    Block c holds queries c*B .. c*B + B - 1 and keys c*B - w .. c*B + B - 1 + w. With B = 2, w = 1, lengths 3 and 1,
    block 0 is

        keys    -1  0  1  2
        query 0  .  x  x  .
        query 1  .  x  x  x

    and block 1 has query 2 seeing keys 1, 2 and query 3 (a sequence of its own) seeing key 3 only.

    With G global tokens K grows by the keys of `first_tokens`. Every other sequence of the block begins among its
    keys, and so do the first tokens of it that lie before a query; what they see themselves is computed apart.
    """
    if pattern.window is None:
        return None
    w, total = pattern.window, batch.num_tokens
    blocks = -(-total // QUERY_BLOCK)
    # Tokens beyond either end belong to no sequence; the queries of the tail see each other, so that no row is all
    # masked.
    sequence = F.pad(batch.sequence_T(), (w, blocks * QUERY_BLOCK - total + w), value=-1)
    keys_CK = sequence.unfold(0, QUERY_BLOCK + 2 * w, QUERY_BLOCK)
    queries_CB = sequence[w : w + blocks * QUERY_BLOCK].view(blocks, QUERY_BLOCK)
    device = batch.device
    distance_BK = torch.arange(QUERY_BLOCK, device=device)[:, None] - torch.arange(-w, QUERY_BLOCK + w, device=device)
    seen = distance_BK.abs() <= w
    if pattern.num_global:
        position = F.pad(batch.positions_T(), (w, blocks * QUERY_BLOCK - total + w))
        seen = seen | (position < pattern.num_global).unfold(0, QUERY_BLOCK + 2 * w, QUERY_BLOCK)[:, None]
    if pattern.causal:
        seen = seen & (distance_BK >= 0)
    mask_CBK = (queries_CB[:, :, None] == keys_CK[:, None, :]) & seen
    if pattern.num_global:
        _, before_CG = first_tokens(batch, pattern.num_global, w)
        mask_CBG = (queries_CB[:, :1] == queries_CB)[:, :, None] & before_CG[:, None]
        mask_CBK = torch.cat([mask_CBK, mask_CBG], dim=2)
    columns = mask_CBK.shape[2]
    wide = torch.zeros(blocks, QUERY_BLOCK, -(-columns // ROW_VALUES) * ROW_VALUES, dtype=dtype, device=device)
    return wide[:, None, :, :columns].masked_fill_(~mask_CBK[:, None], -math.inf)


def first_tokens(batch: PackedBatch, num_global: int, window: int) -> tuple[Tensor, Tensor]:
    """The first G tokens of the sequence that each block of queries begins in, (C, G), and whether they are to be seen.

    Not to be seen are those beyond the end of the batch or among the block's own keys.
    """
    block_C = torch.arange(0, batch.num_tokens, QUERY_BLOCK, device=batch.device, dtype=torch.int32)
    start_C = batch.cu_seqlens[torch.searchsorted(batch.cu_seqlens, block_C, right=True) - 1]
    token_CG = start_C[:, None] + torch.arange(num_global, device=batch.device)
    return token_CG.clamp(max=batch.num_tokens - 1), token_CG < block_C[:, None] - window
