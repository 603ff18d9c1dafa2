"""Selective sparse attention: a block of queries attends to the few blocks of keys that score highest, and to no other.

A sequence is cut into blocks from its own beginning, so that what is selected does not depend on its company in the
batch. The score of two blocks is the product of their mean query and mean key; it is not differentiated. Attention over
what was selected costs linear in the length; the scores are quadratic, at 1 / (2 * block_size ** 2) of what full
attention costs. Shape suffixes: S sequences of one length, N heads, L tokens, H head size, C blocks of a
sequence, J selected blocks, B tokens of a block, R blocks of all sequences and heads.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 1 << 22
"""Elements of the selected keys that are laid side by side at a time: 16 MB in float32."""


def attend_selected(
    q_SNLH: Tensor, k_SNLH: Tensor, v_SNLH: Tensor, key_blocks: int, block_size: int, num_global: int = 0
) -> Tensor:
    """Attention of each block of queries over its selected blocks of keys, (S, N, L, H); see `select`.

    Args:
        key_blocks: blocks that are selected for each block of queries; fewer than the sequence has.
        num_global: the first so many tokens see, and are seen by, all of their sequence.
    """
    length = q_SNLH.shape[2]
    index_SNCJ = select(q_SNLH, k_SNLH, key_blocks, block_size, num_global)
    sequences, heads, blocks, _ = index_SNCJ.shape
    first_block = torch.arange(sequences * heads, device=index_SNCJ.device).view(sequences, heads, 1, 1) * blocks
    index_RJ = (index_SNCJ + first_block).view(-1, key_blocks)
    # What the blocks of a sequence add to the scores of their keys: nothing, but for the padding of the last.
    edge_RB = None
    if padding := -length % block_size:
        edge_CB = torch.zeros(blocks, block_size, dtype=q_SNLH.dtype, device=q_SNLH.device)
        edge_CB[-1, -padding:] = -torch.inf
        edge_RB = edge_CB.repeat(sequences * heads, 1)
    rows = (_to_rows(x, block_size) for x in (q_SNLH, k_SNLH, v_SNLH))
    out_RBH = _SelectedAttention.apply(*rows, index_RJ, edge_RB)
    out_SNLH = out_RBH.view(sequences, heads, -1, out_RBH.shape[-1])[:, :, :length]
    if not num_global:
        return out_SNLH
    first = F.scaled_dot_product_attention(q_SNLH[:, :, :num_global], k_SNLH, v_SNLH)
    return torch.cat([first, out_SNLH[:, :, num_global:]], dim=2)


@torch.no_grad()
def select(q_SNLH: Tensor, k_SNLH: Tensor, key_blocks: int, block_size: int, num_global: int = 0) -> Tensor:
    """The blocks of keys that each block of queries attends to, (S, N, C, J), in ascending order.

    Always among them: the block itself, and those with one of the first `num_global` tokens. The others are those with
    the highest scores, computed in float32; of equal ones the first.
    """
    queries_SNCH, keys_SNCH = (_block_means(x, block_size) for x in (q_SNLH, k_SNLH))
    scores_SNCC = queries_SNCH @ keys_SNCH.transpose(-1, -2)
    scores_SNCC.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    scores_SNCC[..., : -(-num_global // block_size)] = torch.inf
    # topk leaves open which of equal scores it takes; whole numbers that hold score and place are never equal. The bits
    # of a float are ordered as its values are, negative ones the other way round.
    bits = scores_SNCC.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits + 2**31), bits)
    blocks = scores_SNCC.shape[-1]
    place_C = torch.arange(blocks - 1, -1, -1, device=bits.device)
    chosen_SNCJ = (ordered * blocks + place_C).topk(min(key_blocks, blocks), dim=-1).indices
    return chosen_SNCJ.sort(dim=-1).values


def selected_mask(
    q_TNH: Tensor, k_TNH: Tensor, offsets: tuple[int, ...], key_blocks: int, block_size: int, num_global: int = 0
) -> Tensor:
    """The same selection written out, (N, T, T): True where a query sees a key of its sequence. For tests."""
    total, heads = q_TNH.shape[:2]
    mask_NTT = torch.zeros(heads, total, total, dtype=torch.bool, device=q_TNH.device)
    for start, stop in pairwise(offsets):
        q, k = (x_TNH[None, start:stop].transpose(1, 2) for x_TNH in (q_TNH, k_TNH))
        index_NCJ = select(q, k, key_blocks, block_size, num_global)[0]
        blocks = index_NCJ.shape[1]
        chosen_NCC = torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=q_TNH.device)
        chosen_NCC.scatter_(-1, index_NCJ, True)
        mask_NLL = chosen_NCC.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
        mask_NLL[:, :num_global] = True
        mask_NTT[:, start:stop, start:stop] = mask_NLL[:, : stop - start, : stop - start]
    return mask_NTT


def _block_means(x_SNLH: Tensor, block_size: int) -> Tensor:
    length = x_SNLH.shape[2]
    sums_SNCH = _in_blocks(x_SNLH, block_size).sum(dim=3, dtype=torch.float32)
    starts_C = torch.arange(0, length, block_size, device=x_SNLH.device)
    return sums_SNCH / (length - starts_C).clamp(max=block_size)[:, None]


def _in_blocks(x_SNLH: Tensor, block_size: int) -> Tensor:
    """(S, N, C, B, H), the last block padded with zeros."""
    return F.pad(x_SNLH, (0, 0, 0, -x_SNLH.shape[2] % block_size)).unflatten(2, (-1, block_size))


def _to_rows(x_SNLH: Tensor, block_size: int) -> Tensor:
    return _in_blocks(x_SNLH, block_size).flatten(0, 2).contiguous()


class _SelectedAttention(torch.autograd.Function):
    """Attention of rows of queries over the rows of keys and values that `index_RJ` names, strip by strip.

    A gradient is written by hand because the selected keys are `key_blocks` times all keys: they are laid side by side
    for a strip of rows at a time, and once more in the backward pass, where each strip adds its gradients to one sum.
    """

    @staticmethod
    def forward(
        ctx: Any, q_RBH: Tensor, k_RBH: Tensor, v_RBH: Tensor, index_RJ: Tensor, edge_RB: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q_RBH, k_RBH, v_RBH, index_RJ, edge_RB)
        out_RBH = torch.empty_like(q_RBH)
        for rows, index, edge in _strips(k_RBH, index_RJ, edge_RB):
            out_RBH[rows] = _attend_rows(q_RBH[rows], _gather(k_RBH, index), _gather(v_RBH, index), edge)
        return out_RBH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_RBH, k_RBH, v_RBH, index_RJ, edge_RB = ctx.saved_tensors
        wide = torch.promote_types(k_RBH.dtype, torch.float32)
        dq_RBH = torch.empty_like(q_RBH)
        dk_RBH, dv_RBH = (torch.zeros_like(x, dtype=wide) for x in (k_RBH, v_RBH))
        for rows, index, edge in _strips(k_RBH, index_RJ, edge_RB):
            with torch.enable_grad():
                parts = (q_RBH[rows], _gather(k_RBH, index), _gather(v_RBH, index))
                q, k, v = (x.detach().requires_grad_() for x in parts)
                out = _attend_rows(q, k, v, edge)
            dq_RBH[rows], dk, dv = torch.autograd.grad(out, (q, k, v), gradients[0][rows])
            for total, part in ((dk_RBH, dk), (dv_RBH, dv)):
                total.index_add_(0, index.flatten(), part.view(-1, *total.shape[1:]).to(wide))
        return dq_RBH, dk_RBH.to(k_RBH.dtype), dv_RBH.to(v_RBH.dtype), None, None


def _strips(k_RBH: Tensor, index_RJ: Tensor, edge_RB: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows of queries whose selected keys have about GATHERED elements; their blocks; what is added to their scores."""
    height = max(1, GATHERED // (index_RJ.shape[1] * k_RBH[0].numel()))
    for start in range(0, index_RJ.shape[0], height):
        rows = slice(start, start + height)
        index = index_RJ[rows]
        edge = None if edge_RB is None else edge_RB[index].flatten(1)[:, None, None]
        yield rows, index, edge


def _gather(x_RBH: Tensor, index: Tensor) -> Tensor:
    """Selected blocks side by side: (rows of `index`, J * B, H)."""
    return x_RBH.index_select(0, index.flatten()).view(index.shape[0], -1, x_RBH.shape[-1])


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, edge: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=edge)[:, 0]
