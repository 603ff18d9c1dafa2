"""Gradients of a loss that looks at all vectors of a global batch at once, whatever fits in memory: GradCache.

The batch goes through the encoder in bins without keeping a graph, the loss is taken of the vectors of all workers,
and its gradient with respect to them is carried back through the encoder bin by bin in a second pass (Gao et al. 2021,
arXiv 2101.06983). The gradient is that of the whole batch, not an estimate. Shape suffixes: R ranges of a bin, N texts
of the global batch, D width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import PackedBatch
from model.dense import Dense
from model.encoder import Encoder
from model.pooling import encode_segments

LARGEST_SCALE = 100.0
"""Of a learnt temperature, which otherwise goes on falling (CLIP, arXiv 2103.00020)."""

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(vectors of the global batch, scale) -> this worker's part of the loss, and of what is to be reported."""


@dataclass(frozen=True, slots=True)
class VectorBin:
    """Texts that go through the encoder together."""

    batch: PackedBatch
    starts_R: Tensor
    ends_R: Tensor
    """int64 ranges of tokens that are pooled to a vector each; a sequence may hold several texts."""
    texts_R: Tensor
    """int64: which texts of the global batch they are."""


class VectorModel(nn.Module):
    """An encoder that gives one vector a text, and the scale that a loss multiplies cosines by.

    Args:
        pooling: as in `model.pooling`.
        dense: what a pooled vector goes through; trained with the encoder.
        temperature: one over the scale at the start.
        learn_temperature: whether the scale is a parameter; it stays with the training, not with the saved model.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        pooling: str = "mean",
        dense: Sequence[Dense] = (),
        temperature: float = 0.05,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.pooling, self.dense = encoder, pooling, nn.Sequential(*dense)
        self.width = dense[-1].linear.out_features if dense else encoder.config.hidden_size
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]), requires_grad=learn_temperature)

    def forward(self, batch: PackedBatch, starts_R: Tensor, ends_R: Tensor) -> Tensor:
        """Vectors (R, D) of ranges of tokens, not normalised."""
        sums_RD, weights_R = encode_segments(self.encoder, batch, starts_R, ends_R, self.pooling)
        return self.dense(sums_RD / weights_R[:, None])

    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)


def learn_from_vectors(
    model: VectorModel,
    module: nn.Module,
    bins: Sequence[VectorBin],
    num_texts: int,
    loss: Loss,
    *,
    factor: float = 1.0,
    cached: bool = True,
    add_up: Callable[[Tensor], None] = lambda tensor: None,
    accumulating: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a loss over all vectors of a global batch to the model's.

    Args:
        module: what to call for a backward pass: the model, or what spreads it over workers.
        bins: this worker's; one or more, as many as every worker has, which those with fewer fill up with blank ones.
        num_texts: of the global batch.
        loss: as a sum over this worker's rows; the whole is the sum over workers.
        factor: what the gradient is multiplied by (a mean, a loss scale).
        cached: go through the encoder twice and keep the graph of one bin only; otherwise once, keeping all. A single
            bin is never taken twice. Several workers with several bins need it.
        add_up: adds a tensor up over all workers, in place.
        accumulating: the context of a backward pass, told whether it is the last.

    Returns:
        The loss and what `loss` reports, this worker's parts.
    """
    cached = cached and len(bins) > 1
    graphs: list[Tensor] = []
    dtype = torch.promote_types(model.log_scale.dtype, torch.float32)
    vectors_ND = torch.zeros(num_texts, model.width, dtype=dtype, device=model.log_scale.device)
    for number, item in enumerate(bins):
        with torch.set_grad_enabled(not cached), accumulating(not cached and number == len(bins) - 1):
            vectors_RD = (model if cached else module)(item.batch, item.starts_R, item.ends_R)
        graphs += [] if cached else [vectors_RD]
        vectors_ND[item.texts_R] = vectors_RD.detach()
    # Every text is in one bin of one worker: adding zeros to it is exact.
    add_up(vectors_ND)
    vectors_ND.requires_grad_()
    value, report = loss(vectors_ND, model.scale())
    leaves = [vectors_ND, *([model.log_scale] if model.log_scale.requires_grad else [])]
    # A worker without a row, or a loss without a scale, has no gradient there.
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    slope_ND = slopes[0] * factor
    add_up(slope_ND)
    for number, item in enumerate(bins):
        last = number == len(bins) - 1
        with accumulating(last):
            vectors_RD = module(item.batch, item.starts_R, item.ends_R) if cached else graphs[number]
            roots, gradients = [vectors_RD], [slope_ND[item.texts_R]]
            if last and len(slopes) > 1:
                roots, gradients = [*roots, model.log_scale], [*gradients, slopes[1] * factor]
            torch.autograd.backward(roots, gradients)
    return value.detach(), report.detach()
