"""Rotary positions: tables of cosine and sine in float32, and their application to queries and keys.

RoFormer (arXiv 2104.09864) in the half-split layout of GPT-NeoX: dimension d is paired with d + H/2.
Shape suffixes: T tokens, N heads, H head size, P positions.
"""

import torch
from torch import Tensor, nn


def rotary_table(num_positions: int, head_size: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """Cosine and sine of every position, (P, 2, H / 2) in float32.

    The angle of position p and pair d is p * theta ** (-2 d / H), as Hugging Face computes it, in float32.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequency = 1.0 / (theta**exponent)
    angle = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class Rotary(nn.Module):
    """Looks up the rotary table for packed positions; grows the table when a longer sequence comes."""

    def __init__(self, head_size: int, theta: float) -> None:
        super().__init__()
        self.head_size, self.theta = head_size, theta
        self.table: Tensor | None = None

    def forward(self, positions_T: Tensor, max_position: int) -> tuple[Tensor, Tensor]:
        """cos_T1H and sin_T1H in float32 for positions below `max_position`; each holds its half twice over."""
        table = self.table
        if table is None or table.shape[0] < max_position or table.device != positions_T.device:
            # A plain attribute, made on first use: neither saved, nor cast with the weights, nor wrong after a change
            # of theta.
            with torch.inference_mode(False), torch.no_grad():
                table = rotary_table(max(max_position, 512), self.head_size, self.theta, positions_T.device)
            self.table = table
        cos_T, sin_T = table[positions_T].unbind(1)
        return torch.cat([cos_T, cos_T], -1)[:, None], torch.cat([-sin_T, sin_T], -1)[:, None]


def rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Turn queries or keys by their positions, computed in float32 (or wider), returned in their own dtype.

    `sin_T1H` carries the sign of the half that it multiplies, so that the partner is a plain swap of halves.
    """
    wide = torch.promote_types(x_TNH.dtype, torch.float32)
    x = x_TNH.to(wide)
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return torch.addcmul(x * cos_T1H, swapped, sin_T1H.to(wide)).to(x_TNH.dtype)
