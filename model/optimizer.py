"""StableAdamW with fully decoupled weight decay, and the scaling of losses that float16 needs.

AdamW whose step is divided by the root mean square of gradient over its own second moment where that exceeds one
(arXiv 2304.13013), so that a layer whose gradients suddenly grow does not jump. Weight decay follows the shape of the
learning-rate schedule and not its height: it is a share of the weights a step, the same at any peak rate.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parameter_groups(module: nn.Module, weight_decay: float, *, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not. Parameters that are not trained are in no group.

    Args:
        layer_decay: what a layer's rate is multiplied by for every layer above it. What follows the last layer has the
            whole rate, and the embedding, as one layer below the first, the smallest.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    top = 1 + max((layer_of(name) or 0 for name, _ in module.named_parameters()), default=0)
    groups: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in trained:
        layer = layer_of(name)
        scale = 1.0 if layer is None else layer_decay ** (top - layer)
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": some, "weight_decay": weight_decay if decays else 0.0, "decays": decays, "rate_scale": scale}
        for (scale, decays), some in groups.items()
    ]


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to, from 1; 0 for the embedding, None for what follows the last layer."""
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    return int(parts[parts.index("layers") + 1]) + 1 if "layers" in parts else None


class StableAdamW(torch.optim.Optimizer):
    """Adam with update clipping by tensor and fully decoupled weight decay.

    For a gradient g, with moments m and v corrected for their start at zero:

        clip = max(1, sqrt(mean(g^2 / max(v, eps^2))))
        w    = w (1 - weight_decay * lr / peak_lr) - lr / clip * m / (sqrt(v) + eps)

    Args:
        groups: as `parameter_groups` gives them. A parameter may be sharded (a DTensor): the mean goes over the whole
            of it.
        lr: the rate now; a schedule sets it in every group before each step.
        peak_lr: the highest rate of the schedule; weight decay is scaled by lr / peak_lr. A group's `rate_scale` (1 by
            default) multiplies its rate, and not its decay.
        betas, eps: as in Adam.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        peak_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "peak_lr": peak_lr or lr, "betas": betas, "eps": eps, "steps": 0, "weight_decay": 0.0}
        defaults["rate_scale"] = 1.0
        super().__init__(groups, defaults)

    def set_rate(self, lr: float, peak_lr: float) -> None:
        for group in self.param_groups:
            group["lr"], group["peak_lr"] = lr * group["rate_scale"], peak_lr * group["rate_scale"]

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment, sharded as the parameter is; zeros before the first step."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]

    @property
    def steps(self) -> int:
        """Steps taken, which the correction of the moments goes by."""
        return self.param_groups[0]["steps"]

    @steps.setter
    def steps(self, value: int) -> None:
        for group in self.param_groups:
            group["steps"] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Every parameter must have a gradient."""
        assert closure is None
        parameters, ratios = [], []
        for group in self.param_groups:
            group["steps"] += 1
            beta_1, beta_2 = (corrected(beta, group["steps"]) for beta in group["betas"])
            for parameter in group["params"]:
                first, second = (local(m) for m in self.moments(parameter))
                gradient = local(parameter.grad)
                first.lerp_(gradient, 1 - beta_1)
                second.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
                ratios.append((gradient * gradient).div_(second.clamp(min=group["eps"] ** 2)).sum())
                parameters.append((group, parameter, first, second))
        clips = self._clips(torch.stack(ratios), [parameter for _, parameter, _, _ in parameters])
        for (group, parameter, first, second), clip in zip(parameters, clips, strict=True):
            weight, lr = local(parameter), group["lr"]
            if group["weight_decay"]:
                weight.mul_(1 - group["weight_decay"] * lr / group["peak_lr"])
            # The clip stays on the device: reading it would make the host wait for every tensor.
            weight.sub_(first.div(second.sqrt().add_(group["eps"])).mul_(lr / clip))

    @staticmethod
    def _clips(sums: Tensor, parameters: list[Tensor]) -> Tensor:
        """max(1, root mean square) of each parameter; one reduction for all where they are sharded."""
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            dist.all_reduce(sums)
        sizes = torch.tensor([parameter.numel() for parameter in parameters], device=sums.device)
        return (sums / sizes).sqrt().clamp(min=1)


def corrected(beta: float, step: int) -> float:
    """The decay with which a moving average that began at zero is the bias-corrected one: beta, except at the start.

    corrected(0.9, 1) is 0: the first average is the first value.
    """
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gradient_norm(module: nn.Module) -> float:
    """Euclidean norm of all gradients together, the same number on every worker."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@torch.no_grad()
def scale_gradients(module: nn.Module, factor: float) -> None:
    if factor != 1.0:
        torch._foreach_mul_([local(p.grad) for p in module.parameters() if p.grad is not None], factor)


@dataclass(slots=True)
class LossScale:
    """What losses are multiplied by so that small gradients survive float16; 1 for other types.

    Halved when a gradient overflows, down to 1, and doubled after `interval` steps without one.
    """

    value: float = 1.0
    good_steps: int = 0
    interval: int = 2000
    active: bool = False
    """Whether there is anything to scale: for float16."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        return cls(2.0**16, active=True) if dtype == torch.float16 else cls()

    def update(self, *, overflowed: bool) -> None:
        if not self.active:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0
