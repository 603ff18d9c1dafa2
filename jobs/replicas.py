"""Several processes that train one model: sums over them, gradients that are sums over them, and whole tensors out of
sharded ones. A single process is the case of one, without `torch.distributed`.

Gradients are added, not averaged: every process has scaled its loss by what the whole global batch counts, so uneven
shares weigh as they should. Processes with fewer bins than others take part with blank ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.encoder import Layer


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many we are, and who this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str = "ddp"
    """"ddp": whole weights everywhere; "fsdp": weights, gradients and moments split among all."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """The module to call in training; `model` keeps its parameters, which FSDP turns into shards.

        Every process must hold the same weights.
        """
        if self.size == 1:
            return model
        if self.strategy == "fsdp":
            for layer in [part for part in model.modules() if isinstance(part, Layer)]:
                fully_shard(layer)
            fully_shard(model)
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    @property
    def loss_factor(self) -> float:
        """Both strategies divide what they add up by the number of processes; this undoes it."""
        return float(self.size)

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Within: a backward pass whose gradients stay here, unless it is the last one of a step."""
        context: AbstractContextManager[Any] = nullcontext()
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        elif isinstance(module, DistributedDataParallel) and not last:
            context = module.no_sync()
        with context:
            yield

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Within: whole weights everywhere, for passes without a gradient, which do not go through a layer's hooks."""
        sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.unshard()
        yield
        for part in sharded:
            part.reshard()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank. For small things, now and then."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Set a tensor, sharded or not, from a whole one that every process has."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        # Each takes its own part of what it has; nothing is sent.
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
