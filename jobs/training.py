"""The training loop: bins in, steps taken, a line for each. Plain PyTorch; one worker or many, with Ray or without.

What a step does follows from the state before it and from the token shards: not from the number of workers, from
restarts, or from timing. Losses and gradients are means over the masked tokens of the whole global batch.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.checkpoints import Checkpoints
from jobs.monitor import Monitor
from jobs.phases import Phase, PretrainConfiguration
from jobs.replicas import Replicas
from jobs.state import State, save_model, take_down
from model.batch import PackedBatch
from model.flops import cost
from model.losses import IGNORED, Pretraining
from model.optimizer import gradient_norm, scale_gradients
from pipeline.shards import TokenShards
from pipeline.stream import Bin, Step, TokenStream

log = logging.getLogger(__name__)

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


class Diverged(RuntimeError):
    """A loss or a gradient is no number; the message names the bin."""


class Signals:
    """What reaches a run from outside; this one hears nothing."""

    def due(self) -> bool:
        """Whether this worker wants all of them to look."""
        return False

    def look(self) -> str | None:
        """Called by all workers at the same step, with one answer for all: "save", "stop" or None."""
        return None


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same from step to step."""

    configuration: PretrainConfiguration
    phases: tuple[Phase, ...]
    shards: TokenShards
    checkpoints: Checkpoints
    replicas: Replicas = field(default_factory=Replicas)
    monitor: Monitor | None = None
    """On the first worker."""
    signals: Signals = field(default_factory=Signals)
    ceiling_flops: float = math.inf
    """FLOP/s that MFU is a share of, for each worker."""


def train(run: Run, state: State) -> str:
    """Train from a state to the end of the last phase, or to where the run is told to stop.

    Returns:
        "done", with the model written, or "stopped"; a checkpoint is written either way. `state` is what is reached.

    Raises:
        Diverged: a loss or a gradient is no number.
    """
    replicas, keep = run.replicas, run.configuration.keep
    while state.phase < len(run.phases):
        phase = run.phases[state.phase]
        state.enter(phase)
        stream = TokenStream(run.shards, phase.stream)
        held_out = list(stream.evaluation(rank=replicas.rank, num_workers=replicas.size, max_bins=keep.evaluation_bins))
        steps = stream.steps(state.stream, rank=replicas.rank, num_workers=replicas.size)
        with closing(steps):  # which ends its thread
            while state.stream.step < phase.num_steps:
                started = time.perf_counter()
                step = next(steps)
                waited = time.perf_counter() - started
                line = take_step(run, state, phase, step)
                line |= speed(run, line, step, seconds=time.perf_counter() - started, waited=waited)
                ends = state.stream.step == phase.num_steps
                averaging = phase.settings.average_every and phase.is_decaying(state.stream.bins)
                if averaging and (ends or state.stream.step % phase.settings.average_every == 0):
                    state.take_into_average()
                if ends or (keep.evaluate_every and state.step % keep.evaluate_every == 0):
                    line |= evaluate(run, state, held_out)
                if ends:
                    state.phase, state.stream = state.phase + 1, type(state.stream)()
                signal = run.signals.look() if line.pop("asked") else None
                stops = signal == "stop" or state.step == run.configuration.stop_after
                if run.monitor:
                    run.monitor.write(line)
                if ends or stops or signal == "save" or state.step % keep.checkpoint_every == 0:
                    save(run, state)
                if stops and state.phase < len(run.phases):
                    run.checkpoints.wait()
                    return "stopped"
                if ends:
                    break
    finish(run, state)
    run.checkpoints.wait()
    return "done"


def take_step(run: Run, state: State, phase: Phase, step: Step) -> dict[str, Any]:
    """One optimizer step over a global batch; moves the state past it. Returns the step's line."""
    replicas, objective, optimizer = run.replicas, run.configuration.objective, state.optimizer
    counts = replicas.sum(
        [
            sum(len(b.masked_M) for b in step.bins),
            sum(int((b.ordering_S != IGNORED).sum()) for b in step.bins),
            # Forty bits of each bin's hash: their sum is exact, and the same however the bins are shared out.
            sum(int(b.digest()[:10], 16) for b in step.bins),
            sum(training_flops(state, b) for b in step.bins),
            float(run.signals.due()),
        ]
    )
    masked, pairs = max(counts[0], 1.0), max(counts[1], 1.0)
    scale = state.scale.value * replicas.loss_factor
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(Pretraining.SUMS), dtype=torch.float64, device=replicas.device)
    bins = share(step)
    for number, item in enumerate(bins):
        with replicas.accumulating(state.module, last=number == len(bins) - 1):
            loss, parts = state.module(
                *on_device(item, replicas), scale / masked, scale * objective.ordering_weight / pairs
            )
            loss.backward()
        sums += parts
    loss_sum, z_sum, correct, ordering_sum, ordering_correct = replicas.sum(sums.tolist())
    norm = gradient_norm(state.model) / state.scale.value
    total = (loss_sum + objective.z_weight * z_sum) / masked + objective.ordering_weight * ordering_sum / pairs
    overflowed = state.scale.value > 1 and math.isfinite(total) and not math.isfinite(norm)
    if not math.isfinite(total + norm) and not overflowed:
        raise Diverged(find_cause(run, state, phase, step))
    accepted = not overflowed and state.guard.accepts(total, norm)
    rate = phase.rate_at(state.stream.bins)
    if accepted:
        scale_gradients(state.model, min(1.0, run.configuration.optimizer.clip_norm / norm) / state.scale.value)
        optimizer.set_rate(rate, phase.settings.learning_rate)
        optimizer.step()
    state.scale.update(overflowed=overflowed)
    state.step, state.stream, state.tokens = state.step + 1, step.after, state.tokens + step.num_tokens
    if not accepted and replicas.is_first:
        why = "an overflow of float16" if overflowed else f"a spike (loss {total:.3f}, gradient norm {norm:.2f})"
        log.warning("step %d is skipped: %s", state.step, why)
    line = {
        "step": state.step,
        "phase": phase.name,
        "epoch": max((b.epoch for b in step.bins), default=step.after.epoch),
        "loss": loss_sum / masked,
        "accuracy": correct / masked,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "learning_rate": rate,
        "skipped": not accepted,
        "tokens": state.tokens,
        "masked": int(counts[0]),
        "bins": step.num_bins,
        "padding": 1 - step.num_tokens / (step.num_bins * phase.stream.tokens_per_bin),
        "digest": f"{int(counts[2]) % (1 << 40):010x}",
        "workers": replicas.size,
        "flops": counts[3],
        "asked": counts[4] > 0,
    }
    if state.model.ordering is not None:
        line |= {"ordering_loss": ordering_sum / pairs, "ordering_accuracy": ordering_correct / pairs}
    if state.scale.value > 1:
        line["loss_scale"] = state.scale.value
    return line


def speed(run: Run, line: dict[str, Any], step: Step, *, seconds: float, waited: float) -> dict[str, Any]:
    """How fast a step was, as the first worker saw it."""
    return {
        "seconds": round(seconds, 4),
        "tokens_per_s": step.num_tokens / seconds,
        "mfu": line["flops"] / seconds / (run.ceiling_flops * run.replicas.size),
        "data_wait": waited / seconds,
    }


def share(step: Step) -> list[Bin]:
    """This worker's bins, with blank ones up to the number that every worker goes through."""
    return [*step.bins, *[BLANK] * (step.max_bins - len(step.bins))]


def on_device(item: Bin, replicas: Replicas) -> tuple[PackedBatch, Tensor, Tensor, Tensor]:
    """A bin as `Pretraining` takes it."""
    arrays = (item.tokens_T, item.cu_seqlens, item.masked_M, item.targets_M, item.ordering_S)
    tokens, offsets, masked, targets, ordering = (
        torch.from_numpy(array).to(replicas.device, non_blocking=True) for array in arrays
    )
    batch = PackedBatch(tokens, offsets, item.max_seqlen, tuple(item.cu_seqlens.tolist()))
    return batch, masked, targets, ordering


def training_flops(state: State, item: Bin) -> int:
    """What the mathematics of a bin's step needs; recomputed activations are no work of their own."""
    config = state.model.language_model.model.config
    lengths = np.diff(item.cu_seqlens).tolist()
    return cost(config, lengths, mode="training", predicted_tokens=len(item.masked_M)).flops


def held_out_bins(run: Run, stream: TokenStream) -> list[Bin]:
    """This worker's share of the bins of an evaluation, which are the same every time."""
    replicas, most = run.replicas, run.configuration.keep.evaluation_bins
    return list(stream.evaluation(rank=replicas.rank, num_workers=replicas.size, max_bins=most))


@torch.no_grad()
def evaluate(run: Run, state: State, held_out: Sequence[Bin]) -> dict[str, float]:
    """Loss and accuracy on the held-out bins, this worker's share of which is given."""
    replicas = run.replicas
    most = max(replicas.gather(len(held_out)))
    sums = torch.zeros(len(Pretraining.SUMS), dtype=torch.float64, device=replicas.device)
    with replicas.gathered(state.model):
        for item in [*held_out, *[BLANK] * (most - len(held_out))]:
            sums += state.model(*on_device(item, replicas))[1]
    counts = [sum(len(b.masked_M) for b in held_out), sum(int((b.ordering_S != IGNORED).sum()) for b in held_out)]
    masked, pairs, loss, _, correct, ordering, ordering_correct = replicas.sum([*counts, *sums.tolist()])
    if not masked:
        return {}
    values = {"heldout_loss": loss / masked, "heldout_accuracy": correct / masked}
    if pairs:
        values |= {"heldout_ordering_loss": ordering / pairs, "heldout_ordering_accuracy": ordering_correct / pairs}
    return values


def save(run: Run, state: State) -> None:
    """Begin to write a checkpoint, after what leads up to it."""
    if run.monitor:
        run.monitor.mirror()
    first = run.replicas.is_first
    checkpoint = take_down(state, run.configuration, run.phases, run.shards.manifest, first)
    if checkpoint is not None:
        run.checkpoints.save(checkpoint)


def finish(run: Run, state: State) -> None:
    """Write the model: the average over the decay where it is better on held-out text, else the last weights."""
    first, output = run.replicas.is_first, run.configuration.output
    state.enter(run.phases[-1])
    if state.average:
        held_out = held_out_bins(run, TokenStream(run.shards, run.phases[-1].stream))
        last = evaluate(run, state, held_out).get("heldout_loss", math.inf)
        state.swap_average()
        mean = evaluate(run, state, held_out).get("heldout_loss", math.inf)
        if mean > last:
            state.swap_average()
        if first:
            log.info("held-out loss %.4f, of the average of %d weights %.4f", last, state.averaged, mean)
    save_model(state, output, run.shards.tokenizer_folder() if first else "", first=first)
    run.replicas.wait()


def find_cause(run: Run, state: State, phase: Phase, step: Step) -> str:
    """Which bin a loss or gradient that is no number comes from: each again by itself, with blanks on other workers."""
    replicas, where = run.replicas, f"phase {phase.name!r}, step {state.step + 1}"
    bins = share(step)
    for rank in range(replicas.size):
        for item in bins:
            item = item if rank == replicas.rank else BLANK
            state.optimizer.zero_grad(set_to_none=True)
            with replicas.accumulating(state.module, last=True):
                loss, _ = state.module(*on_device(item, replicas), 1.0, 1.0)
                loss.backward()
            value = replicas.sum([float(loss.detach())])[0]
            if not math.isfinite(value + gradient_norm(state.model)):
                name = replicas.gather(item.name)[rank]
                what = "loss" if not math.isfinite(value) else "gradient"
                return (
                    f"{where}: the {what} is no number, because of {name}; the last checkpoint is whole, so go on from "
                    "it with a lower learning rate or in a wider dtype, or take the bin's documents out"
                )
    return f"{where}: loss or gradient is no number, though each bin by itself gives one; go on with a lower rate"
