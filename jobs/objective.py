"""What a run learns, behind one seam: where its steps come from, what a loss is of them, and what is said about it.

The loop (jobs/training.py) knows optimizers, workers, checkpoints and time, and asks an `Objective` for the rest.
`LanguageModelling` is pretraining: masked tokens with or without sentence ordering, or the next token.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.phases import ObjectiveSettings, Phase
from jobs.replicas import Replicas
from jobs.state import State, save_model
from model.batch import PackedBatch
from model.flops import cost
from model.losses import IGNORED, Pretraining
from pipeline.shards import TokenShards
from pipeline.stream import Bin, Step, StreamState, TokenStream


class Item(Protocol):
    """What goes through the model at once."""

    @property
    def name(self) -> str:
        """Which one it is, for people."""

    def digest(self) -> str:
        """A hash, in hexadecimal, of what the model is given and of what it has to say."""


class Share(Protocol):
    """One worker's share of a global batch; the numbers are of all workers together."""

    @property
    def bins(self) -> Sequence[Item]: ...
    @property
    def num_bins(self) -> int: ...
    @property
    def max_bins(self) -> int:
        """The most that a worker has: others go through blank ones up to it."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def capacity(self) -> int:
        """Tokens that all its bins could hold."""

    @property
    def epoch(self) -> int: ...
    @property
    def after(self) -> StreamState:
        """What to resume with when this step is done."""


class Objective(Protocol):
    """What the loop asks for. All workers call everything at the same step; lists of numbers that are "added up" are
    equally long on all of them, and the loop adds them up, in float64, before it passes them on.
    """

    def steps(self, phase: Phase, start: StreamState, replicas: Replicas) -> Generator[Any, None, None]:
        """This worker's `Share` of the steps of a phase, from a state on, until the generator is closed."""

    def held_out(self, phase: Phase, replicas: Replicas) -> Sequence[Any]:
        """This worker's share of what is evaluated, the same every time; `evaluate` gets it."""

    def counts(self, step: Any) -> list[float]:
        """What this worker's share counts, to be added up: what losses are means over."""

    def flops(self, state: State, step: Any) -> int:
        """What the mathematics of this worker's share needs."""

    def learn(self, state: State, replicas: Replicas, step: Any, counts: Sequence[float], factor: float) -> list[float]:
        """Forward and backward passes over this worker's share.

        Args:
            counts: added up.
            factor: what the loss of the global batch is multiplied by for the backward pass.

        Returns:
            What is to be added up for `line`.
        """

    def line(self, counts: Sequence[float], sums: Sequence[float]) -> tuple[float, dict[str, Any]]:
        """The loss that was minimised, and what the line of a step says; "loss" and "accuracy" are among it, and
        "source" where steps are of one of several: spikes are told by the steps of the same one.
        """

    def alone(self, state: State, replicas: Replicas, item: Any | None) -> float:
        """The loss of one bin by itself, or of a blank one, with its gradient: to find what made a step no number."""

    def evaluate(self, state: State, replicas: Replicas, held_out: Sequence[Any]) -> dict[str, float]:
        """Values of the held-out share, the same on all workers; "heldout_loss" among them where there is a share."""

    def facts(self) -> dict[str, Any]:
        """What a run that goes on must find as it was, by name; as JSON has it."""

    def save(self, state: State, output: str, *, first: bool) -> None:
        """Write the model that came out to OUTPUT/model, on the first worker."""


BLANK = Bin(
    tokens_T=np.zeros(1, np.int64),
    cu_seqlens=np.array([0, 1], np.int32),
    max_seqlen=1,
    masked_M=np.empty(0, np.int64),
    targets_M=np.empty(0, np.int64),
    ordering_S=np.full(1, IGNORED, np.int64),
    documents_S=np.zeros(1, np.uint64),
    starts_S=np.zeros(1, np.int64),
    positions_T=np.full(1, -1, np.int32),
    epoch=0,
    name="blank",
)
"""What a worker with fewer bins than others takes part with; nothing in it is to be predicted."""


@dataclass(frozen=True, slots=True)
class LanguageModelling:
    """Tokens to predict in bins of a token stream, by a `Pretraining` model. Losses are means over the predicted tokens
    (and pairs) of the whole global batch, wherever its bins went.
    """

    shards: TokenShards
    settings: ObjectiveSettings
    evaluation_bins: int | None = None
    """Of all workers together; None takes all."""

    def steps(self, phase: Phase, start: StreamState, replicas: Replicas) -> Generator[Step, None, None]:
        return TokenStream(self.shards, phase.stream).steps(start, rank=replicas.rank, num_workers=replicas.size)

    def held_out(self, phase: Phase, replicas: Replicas) -> list[Bin]:
        stream = TokenStream(self.shards, phase.stream)
        return list(stream.evaluation(rank=replicas.rank, num_workers=replicas.size, max_bins=self.evaluation_bins))

    def counts(self, step: Step) -> list[float]:
        return count(step.bins)

    def flops(self, state: State, step: Step) -> int:
        """Recomputed activations are no work of their own."""
        config, total = state.encoder.config, 0
        for item in step.bins:
            lengths = np.diff(item.cu_seqlens).tolist()
            total += cost(config, lengths, mode="training", predicted_tokens=len(item.masked_M)).flops
        return total

    def learn(
        self, state: State, replicas: Replicas, step: Step, counts: Sequence[float], factor: float
    ) -> list[float]:
        predicted, pairs = (max(number, 1.0) for number in counts)
        scales = factor / predicted, factor * self.settings.ordering_weight / pairs
        sums = torch.zeros(len(Pretraining.SUMS), dtype=torch.float64, device=replicas.device)
        bins = [*step.bins, *[BLANK] * (step.max_bins - len(step.bins))]
        for number, item in enumerate(bins):
            with replicas.accumulating(state.module, last=number == len(bins) - 1):
                loss, parts = state.module(*on_device(item, replicas), *scales)
                loss.backward()
            sums += parts
        return sums.tolist()

    def line(self, counts: Sequence[float], sums: Sequence[float]) -> tuple[float, dict[str, Any]]:
        predicted, pairs = (max(number, 1.0) for number in counts)
        loss, z, correct, ordering, ordered = sums
        total = (loss + self.settings.z_weight * z) / predicted + self.settings.ordering_weight * ordering / pairs
        values = {"loss": loss / predicted, "accuracy": correct / predicted, "masked": int(counts[0])}
        if self.settings.ordering_weight:
            values |= {"ordering_loss": ordering / pairs, "ordering_accuracy": ordered / pairs}
        return total, values

    def alone(self, state: State, replicas: Replicas, item: Bin | None) -> float:
        with replicas.accumulating(state.module, last=True):
            loss, _ = state.module(*on_device(item or BLANK, replicas), 1.0, 1.0)
            loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, state: State, replicas: Replicas, held_out: Sequence[Bin]) -> dict[str, float]:
        most = max(replicas.gather(len(held_out)))
        sums = torch.zeros(len(Pretraining.SUMS), dtype=torch.float64, device=replicas.device)
        with replicas.gathered(state.model):
            for item in [*held_out, *[BLANK] * (most - len(held_out))]:
                sums += state.model(*on_device(item, replicas))[1]
        predicted, pairs, loss, _, correct, ordering, ordered = replicas.sum([*count(held_out), *sums.tolist()])
        if not predicted:
            return {}
        values = {"heldout_loss": loss / predicted, "heldout_accuracy": correct / predicted}
        if pairs:
            values |= {"heldout_ordering_loss": ordering / pairs, "heldout_ordering_accuracy": ordered / pairs}
        return values

    def facts(self) -> dict[str, Any]:
        return facts_of(self.settings) | {"manifest": self.shards.manifest.fingerprint}

    def save(self, state: State, output: str, *, first: bool) -> None:
        save_model(state, output, self.shards.tokenizer_folder() if first else "", first=first)


def facts_of(settings: ObjectiveSettings) -> dict[str, Any]:
    """What of the objective decides the architecture, or what the bins are."""
    return {"the task": settings.task, "sentence ordering": settings.ordering_weight > 0}


def count(bins: Sequence[Bin]) -> list[float]:
    """Tokens to predict, and pairs."""
    return [sum(len(b.masked_M) for b in bins), sum(int((b.ordering_S != IGNORED).sum()) for b in bins)]


def on_device(item: Bin, replicas: Replicas) -> tuple[PackedBatch, Tensor, Tensor, Tensor]:
    """A bin as `Pretraining` takes it."""
    arrays = (item.tokens_T, item.cu_seqlens, item.masked_M, item.targets_M, item.ordering_S)
    tokens, offsets, masked, targets, ordering = (
        torch.from_numpy(array).to(replicas.device, non_blocking=True) for array in arrays
    )
    batch = PackedBatch(tokens, offsets, item.max_seqlen, tuple(item.cu_seqlens.tolist()))
    return batch, masked, targets, ordering
