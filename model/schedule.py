"""Learning rates over a phase of training: a trapezoid with a 1 - sqrt decay (arXiv 2405.18392), counted in tokens.

Tokens are nominal: the budget of the bins, not what is in them. So the rate of a step follows from the number of bins
before it and from nothing that a worker measured.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

from model.errors import InputError


@dataclass(frozen=True, slots=True)
class Trapezoid:
    """Linear rise, plateau, fall as 1 - sqrt; all in tokens. The rise and the fall may be 0 long."""

    peak: float
    """Highest learning rate."""
    tokens: int
    """Length of the whole."""
    warmup_tokens: int = 0
    decay_tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens <= 0 or min(self.warmup_tokens, self.decay_tokens) < 0:
            raise InputError(f"a schedule of {self.tokens} tokens cannot be trained; give it a positive length")
        if self.warmup_tokens + self.decay_tokens > self.tokens:
            raise InputError(
                f"warmup_tokens {self.warmup_tokens} and decay_tokens {self.decay_tokens} are longer together than the "
                f"schedule's {self.tokens} tokens; shorten one"
            )

    def factor(self, before: int, after: int) -> float:
        """Share of the peak, in (0, 1], for the step that goes from `before` tokens to `after`.

        The rise looks at the end of the step and the fall at its start, so that no step is wasted on a rate of 0: with
        100 tokens, a rise of 20 and a fall of 20, steps of 10 have 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.29.
        """
        if after < self.warmup_tokens:
            return after / self.warmup_tokens
        falling = before - (self.tokens - self.decay_tokens)
        if falling <= 0:
            return 1.0
        return 1 - math.sqrt(min(falling / self.decay_tokens, 1.0))

    def rate(self, before: int, after: int) -> float:
        return self.peak * self.factor(before, after)


@dataclass(slots=True)
class SpikeGuard:
    """Tells a step to skip from one to take, by what the steps before it were like.

    A step is a spike when its loss, or the logarithm of its gradient norm, lies `deviations` standard deviations above
    the mean of the last `window` accepted steps (and by a margin, since a quiet run has tiny deviations). It depends on
    the numbers alone, so a run that is repeated or resumed skips the same steps.
    """

    deviations: float = 6.0
    window: int = 128
    least: int = 20
    """Accepted steps that are needed before anything is called a spike."""
    most_in_a_row: int = 8
    """After so many skipped steps the new level is accepted: a guard must not stop the training for good."""
    losses: list[float] | None = None
    norms: list[float] | None = None
    skipped: int = 0
    """Steps skipped just before this one."""

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether to take a step; remembers it if so. Values must be finite."""
        self.losses, self.norms = self.losses or [], self.norms or []
        scale = math.log(max(norm, 1e-30))
        spike = self._above(self.losses, loss, margin=0.1) or self._above(self.norms, scale, margin=1.0)
        if spike and self.skipped < self.most_in_a_row:
            self.skipped += 1
            return False
        if spike:
            self.losses, self.norms = [], []
        self.skipped = 0
        self.losses = [*self.losses, loss][-self.window :]
        self.norms = [*self.norms, scale][-self.window :]
        return True

    def _above(self, history: list[float], value: float, *, margin: float) -> bool:
        if self.deviations <= 0 or len(history) < self.least:
            return False
        mean = fmean(history)
        return value > mean + max(self.deviations * pstdev(history, mean), margin)
