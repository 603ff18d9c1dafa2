"""From token vectors to one vector a text: every pooling is a weighted sum over a range of tokens.

A vector that spans several windows of a long document adds up its sums and weights before it divides, so that pooling a
document in windows and pooling it whole are one definition. Shape suffixes: T tokens, R ranges, D width.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import PackedBatch

PoolingMode = Literal["mean", "cls", "last", "weighted_mean"]
POOLING_MODES: tuple[str, ...] = get_args(PoolingMode)


def pool_segments(
    hidden_TD: Tensor, starts_R: Tensor, ends_R: Tensor, mode: str, positions_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sums of token vectors over ranges of a packed batch.

    Args:
        hidden_TD: token vectors.
        starts_R, ends_R: int64 ranges, end exclusive, none empty; they may overlap and come in any order.
        mode: "mean" weighs each token 1; "cls" takes the first token of the range; "last" its last;
            "weighted_mean" weighs the token at position i i + 1.
        positions_T: int64 position of each token in its sequence, which "weighted_mean" weighs by; None counts within
            the range.

    Returns:
        sums (R, D) and weights (R,), float32 or wider. The pooled vector is sums / weights.
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    rows_R = token_of(starts_R, ends_R, mode)
    if rows_R is not None:
        return hidden_TD[rows_R].to(wide), torch.ones_like(rows_R, dtype=wide)
    if mode not in ("mean", "weighted_mean"):
        raise ValueError(f"unknown pooling mode {mode!r}; known are {', '.join(POOLING_MODES)}")
    lengths_R = ends_R - starts_R
    total = int(lengths_R.sum())
    segment = torch.repeat_interleave(
        torch.arange(len(starts_R), device=hidden_TD.device), lengths_R, output_size=total
    )
    within = torch.arange(total, device=hidden_TD.device) - (lengths_R.cumsum(0) - lengths_R)[segment]
    tokens_X = starts_R[segment] + within
    tokens_XD = hidden_TD[tokens_X].to(wide)
    if mode == "mean":
        weights_R = lengths_R.to(wide)
    else:
        weights_X = ((within if positions_T is None else positions_T[tokens_X]) + 1).to(wide)
        tokens_XD = tokens_XD * weights_X[:, None]
        weights_R = torch.zeros_like(lengths_R, dtype=wide).index_add(0, segment, weights_X)
    sums_RD = torch.zeros(len(starts_R), hidden_TD.shape[1], dtype=wide, device=hidden_TD.device)
    return sums_RD.index_add(0, segment, tokens_XD), weights_R


def token_of(starts_R: Tensor, ends_R: Tensor, mode: str) -> Tensor | None:
    """The one token that stands for each range, None in modes where all of its tokens do."""
    return {"cls": starts_R, "last": ends_R - 1}.get(mode)


def encode_segments(
    encoder: Callable[..., Tensor], batch: PackedBatch, starts_R: Tensor, ends_R: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """`pool_segments` of what an encoder makes of a batch, which is not asked for tokens that nothing is taken from."""
    rows_R = token_of(starts_R, ends_R, mode)
    if rows_R is not None:
        hidden_RD = encoder(batch, select_M=rows_R)
        return hidden_RD, torch.ones_like(rows_R, dtype=hidden_RD.dtype)
    positions_T = batch.positions_T() if mode == "weighted_mean" else None
    return pool_segments(encoder(batch), starts_R, ends_R, mode, positions_T)


def encode_pooled(encoder: Callable[..., Tensor], batch: PackedBatch, mode: str) -> Tensor:
    """One vector a sequence, (S, D), not normalised."""
    offsets = batch.cu_seqlens.long()
    sums_SD, weights_S = encode_segments(encoder, batch, offsets[:-1], offsets[1:], mode)
    return sums_SD / weights_S[:, None]


def normalize(vectors_RD: Tensor) -> Tensor:
    """Unit Euclidean length; a zero vector stays zero."""
    return F.normalize(vectors_RD, dim=-1)
