"""What pretraining minimises: the masked-token loss, with logits for the masked positions only, and sentence ordering;
and for decoders the loss of the next token.

Everything comes as sums over this batch times weights that the caller chose, because the mean is one over the masked
tokens of a whole global batch, of which a batch here is a part. Shape suffixes: T tokens, M masked tokens, S sequences,
D width, V vocabulary, R rows of a strip.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.batch import PackedBatch
from model.config import EncoderConfig
from model.decoder import CausalLanguageModel
from model.encoder import Linear
from model.heads import MaskedLanguageModel, PredictionHead

IGNORED = -100
"""Ordering label of a sequence that is no ordered or swapped pair."""

STRIP = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits held at once, in values. A whole batch's would be the largest tensor of the training by far (base size, 16,384
tokens, 30 % masked: 250 million)."""


class MaskedCrossEntropy(torch.autograd.Function):
    """Decoder and cross-entropy in strips of rows, with the gradient taken on the way: no logit is kept or made twice.

    Logits are in the dtype of `hidden_MD`, softmax and sums in float32 (float64 where that is).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        z_weight: float,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss -log p(target) + z_weight log(Z)^2, and three sums to report: loss without z, z, correct.

        Args:
            learning: whether a backward pass is to come (this function cannot see that).
        """
        dtype = hidden_MD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        sums = torch.zeros(3, dtype=wide, device=hidden_MD.device)
        if learning:
            gradient_MD = torch.empty_like(hidden_MD)
            gradient_VD = torch.zeros(weight.shape, dtype=wide, device=weight.device)
            gradient_V = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        # Each strip adds to the gradient of the whole decoder: strips as long as it is wide keep that the smaller part.
        rows = max(hidden_MD.shape[1], STRIP.get(hidden_MD.device.type, STRIP["cpu"]) // weight.shape[0])
        for start in range(0, hidden_MD.shape[0], rows):
            strip = slice(start, start + rows)
            logits_RV = F.linear(hidden_MD[strip], weight, bias)
            loss_R, log_z_R, correct, slope_RV = kernels.cross_entropy(
                logits_RV, targets_M[strip], z_weight, learning=learning
            )
            sums += torch.stack([loss_R.sum(), (log_z_R**2).sum(), correct])
            if not learning:
                continue
            gradient_MD[strip] = slope_RV @ weight
            gradient_VD += slope_RV.T @ hidden_MD[strip]
            if gradient_V is not None:
                gradient_V += slope_RV.sum(dim=0)
        if learning:
            ctx.save_for_backward(gradient_MD, gradient_VD, gradient_V)
        ctx.mark_non_differentiable(sums)
        return sums[0] + z_weight * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        scale = gradients[0]
        gradient_MD, gradient_VD, gradient_V = ctx.saved_tensors
        # The scale carries 1 / (masked tokens) and the factor of float16: applied in the wide type.
        hidden = (gradient_MD * scale).to(gradient_MD.dtype)
        return hidden, gradient_VD * scale, None if gradient_V is None else gradient_V * scale, None, None, None


class OrderingHead(nn.Module):
    """Whether the two segments of a sequence stand in their order or were swapped (ALBERT, arXiv 1909.11942)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head = PredictionHead(config)
        self.classifier = Linear(config.hidden_size, 2)

    def forward(self, first_SD: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits (S, 2) from the vectors of the first tokens, [CLS]."""
        return self.classifier(self.head(first_SD, dtype)).float()


class Pretraining(nn.Module):
    """An encoder with its masked-token head, and an ordering head where asked for, or a decoder with its next-token
    head, that returns losses.

    Args:
        language_model: encoder or decoder with its head; saved by itself at the end.
        ordering: whether there is an ordering head, for an encoder. Without one there is no ordering loss.
        z_weight: of log(Z)^2 in the token loss, which keeps logits from drifting (0 for none).
    """

    SUMS = ("loss", "z", "correct", "ordering_loss", "ordering_correct")
    """What `forward` reports, summed over the batch."""

    def __init__(
        self,
        language_model: MaskedLanguageModel | CausalLanguageModel,
        *,
        ordering: bool = False,
        z_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.ordering = OrderingHead(language_model.model.config) if ordering else None
        self.z_weight = z_weight

    def forward(
        self,
        batch: PackedBatch,
        masked_M: Tensor,
        targets_M: Tensor,
        ordering_S: Tensor,
        masked_scale: float = 1.0,
        ordering_scale: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, for a backward pass, and the five unweighted `SUMS`, without a gradient.

        Args:
            masked_M: int64 indices of the packed tokens that something is predicted at; may be empty.
            targets_M: int64, the tokens that stood there, or that come next.
            ordering_S: int64, 0 for segments in order, 1 for swapped ones, `IGNORED` for neither.
            masked_scale: what the sum of the masked-token losses is multiplied by: one over the masked tokens of the
                global batch.
            ordering_scale: the same for ordering, with its weight.
        """
        model = self.language_model
        head, dtype = model.head if isinstance(model, MaskedLanguageModel) else model.lm_head, model.model.dtype
        first_S = masked_M[:0] if self.ordering is None else batch.cu_seqlens[:-1].long()
        hidden_MD = model.model(batch, select_M=torch.cat([masked_M, first_S]))
        head_MD = head(hidden_MD[: len(masked_M)], dtype)
        summed, sums = MaskedCrossEntropy.apply(
            head_MD, model.decoder.weight, model.decoder.bias, targets_M, self.z_weight, torch.is_grad_enabled()
        )
        loss = summed * masked_scale
        ordering_sums = sums.new_zeros(2)
        if self.ordering is not None:
            logits_S2 = self.ordering(hidden_MD[len(masked_M) :], dtype)
            ordering = F.cross_entropy(logits_S2, ordering_S, ignore_index=IGNORED, reduction="sum")
            loss = loss + ordering * ordering_scale
            correct = (logits_S2.argmax(dim=1) == ordering_S).sum()
            ordering_sums = torch.stack([ordering.detach(), correct]).to(sums.dtype)
        return loss, torch.cat([sums, ordering_sums])


def next_token_loss(
    model: CausalLanguageModel, batch: PackedBatch, scale: float = 1.0, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Every token but the last of its sequence predicts the one after it: no target lies in another sequence.

    Args:
        scale: what the sum of the losses is multiplied by: one over the tokens predicted in the global batch, which
            are its tokens less its sequences.

    Returns:
        The loss, for a backward pass, and three sums without a gradient: loss without z, z, correct.
    """
    goes_on_T = torch.ones_like(batch.tokens_T, dtype=torch.bool)
    goes_on_T[batch.cu_seqlens[1:].long() - 1] = False
    index_M = goes_on_T.nonzero().squeeze(1)
    head_MD = model.lm_head(model.model(batch, select_M=index_M), model.model.dtype)
    targets_M = batch.tokens_T[index_M + 1]
    summed, sums = MaskedCrossEntropy.apply(
        head_MD, model.decoder.weight, model.decoder.bias, targets_M, z_weight, torch.is_grad_enabled()
    )
    return summed * scale, sums
