"""The training loop: bins in, steps taken, a line for each. Plain PyTorch; one worker or many, with Ray or without.

What is learned is an `Objective`'s; what a step does follows from the state before it and from the data: not from the
number of workers, from restarts, or from timing. Losses and gradients are means over the whole global batch.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from jobs.checkpoints import Checkpoints
from jobs.monitor import Ceiling, Monitor, measure_ceiling
from jobs.objective import Objective, Share
from jobs.phases import Phase, RunSettings
from jobs.replicas import Replicas
from jobs.state import State, bring_back, take_down
from model.optimizer import gradient_norm, scale_gradients

log = logging.getLogger(__name__)


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

    configuration: RunSettings
    phases: tuple[Phase, ...]
    objective: Objective
    checkpoints: Checkpoints
    replicas: Replicas = field(default_factory=Replicas)
    monitor: Monitor | None = None
    """On the first worker."""
    signals: Signals = field(default_factory=Signals)
    ceiling: Ceiling = field(default_factory=lambda: Ceiling(lambda: math.inf))
    """What MFU is a share of, for each worker."""


def train(run: Run, state: State) -> str:
    """Train from a state to the end of the last phase, or to where the run is told to stop.

    Returns:
        "done", with the model written, or "stopped"; a checkpoint is written either way. `state` is what is reached.

    Raises:
        Diverged: a loss or a gradient is no number.
    """
    replicas, keep, stop_after = run.replicas, run.configuration.keep, run.configuration.stop_after or math.inf
    while state.phase < len(run.phases):
        if state.step >= stop_after:  # the checkpoint that it began with stands there
            return "stopped"
        phase = run.phases[state.phase]
        if not state.stream.step:  # an average is of one phase, whatever became of the one before
            state.average, state.averaged = {}, 0
        if state.stream.step >= phase.num_steps:  # its end was moved to where the checkpoint stands
            state.phase, state.stream = state.phase + 1, type(state.stream)()
            continue
        state.enter(phase)
        held_out = run.objective.held_out(phase, replicas)
        steps = run.objective.steps(phase, state.stream, replicas)
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
                    line |= run.objective.evaluate(state, replicas, held_out)
                if ends:
                    state.phase, state.stream = state.phase + 1, type(state.stream)()
                signal = run.signals.look() if line.pop("asked") else None
                stops = signal == "stop" or state.step >= stop_after
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


def take_step(run: Run, state: State, phase: Phase, step: Share) -> dict[str, Any]:
    """One optimizer step over a global batch; moves the state past it. Returns the step's line."""
    replicas, objective, optimizer = run.replicas, run.objective, state.optimizer
    flops, digest, asked, *counts = replicas.sum(
        [
            objective.flops(state, step),
            # Forty bits of each bin's hash: their sum is exact, and the same however the bins are shared out.
            sum(int(b.digest()[:10], 16) for b in step.bins),
            float(run.signals.due()),
            *objective.counts(step),
        ]
    )
    optimizer.zero_grad(set_to_none=True)
    sums = objective.learn(state, replicas, step, counts, state.scale.value * replicas.loss_factor)
    total, values = objective.line(counts, replicas.sum(sums))
    norm = gradient_norm(state.model) / state.scale.value
    overflowed = state.scale.value > 1 and math.isfinite(total) and not math.isfinite(norm)
    if not math.isfinite(total + norm) and not overflowed:
        raise Diverged(find_cause(run, state, phase, step))
    accepted = not overflowed and state.guard_of(values.get("source", "")).accepts(total, norm)
    rate = phase.rate_at(state.stream.bins)
    if accepted:
        clip_norm = run.configuration.optimizer.clip_norm
        scale_gradients(state.model, clip_norm / max(norm, clip_norm) / state.scale.value)  # the norm may be 0
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
        "epoch": step.epoch,
        **values,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "learning_rate": rate,
        "skipped": not accepted,
        "tokens": state.tokens,
        "bins": step.num_bins,
        "padding": 1 - step.num_tokens / step.capacity,
        "digest": f"{int(digest) % (1 << 40):010x}",
        "workers": replicas.size,
        "flops": flops,
        "asked": asked > 0,
    }
    if state.scale.active:
        line["loss_scale"] = state.scale.value
    return line


def speed(run: Run, line: dict[str, Any], step: Share, *, seconds: float, waited: float) -> dict[str, Any]:
    """How fast a step was, as the first worker saw it."""
    return {
        "seconds": round(seconds, 4),
        "tokens_per_s": step.num_tokens / seconds,
        "mfu": run.ceiling.share(line["flops"] / seconds / run.replicas.size),
        "data_wait": waited / seconds,
    }


def save(run: Run, state: State) -> None:
    """Begin to write a checkpoint, after what leads up to it."""
    if run.monitor:
        run.monitor.mirror()
    first = run.replicas.is_first
    checkpoint = take_down(state, run.configuration, run.phases, run.objective.facts(), first)
    if checkpoint is not None:
        run.checkpoints.save(checkpoint)


def finish(run: Run, state: State) -> None:
    """Write the model: the average over the decay where it is better on held-out text, else the last weights."""
    objective, replicas = run.objective, run.replicas
    state.enter(run.phases[-1])
    if state.average:
        held_out = objective.held_out(run.phases[-1], replicas)
        last = objective.evaluate(state, replicas, held_out).get("heldout_loss", math.inf)
        state.swap_average()
        mean = objective.evaluate(state, replicas, held_out).get("heldout_loss", math.inf)
        if mean > last:
            state.swap_average()
        if replicas.is_first:
            log.info("held-out loss %.4f, of the average of %d weights %.4f", last, state.averaged, mean)
    objective.save(state, run.configuration.output, first=replicas.is_first)
    replicas.wait()


def find_cause(run: Run, state: State, phase: Phase, step: Share) -> str:
    """Which bin a loss or gradient that is no number comes from: each again by itself, with blanks on other workers."""
    replicas, where = run.replicas, f"phase {phase.name!r}, step {state.step + 1}"
    for rank in range(replicas.size):
        for number in range(step.max_bins):
            item = step.bins[number] if rank == replicas.rank and number < len(step.bins) else None
            state.optimizer.zero_grad(set_to_none=True)
            value = replicas.sum([run.objective.alone(state, replicas, item)])[0]
            if not math.isfinite(value + gradient_norm(state.model)):
                name = replicas.gather(item.name if item else "")[rank]
                what = "loss" if not math.isfinite(value) else "gradient"
                return (
                    f"{where}: the {what} is no number, because of {name}; the last checkpoint is whole, so go on from "
                    "it with a lower learning rate or in a wider dtype, or take the bin's documents out"
                )
    return f"{where}: loss or gradient is no number, though each bin by itself gives one; go on with a lower rate"


def resume(
    configuration: RunSettings,
    phases: tuple[Phase, ...],
    objective: Objective,
    state: State,
    replicas: Replicas,
    signals: Signals,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train from the latest checkpoint of a run, or from its beginning; with Ray or without.

    Args:
        state: the beginning.
        show: gets every line, on the first worker.

    Returns:
        status ("done", "stopped", "diverged" with its message), steps and tokens done, and the last values of loss.
    """
    checkpoints = Checkpoints(configuration.output, configuration.keep.checkpoints)
    steps = checkpoints.steps()
    # Looked up by the first worker for all: another's listing may be older.
    latest = replicas.gather(steps[-1] if steps else None)[0]
    if latest is not None:
        bring_back(state, checkpoints.load(latest))
    last: dict[str, Any] = {}

    def show_and_keep(line: dict[str, Any]) -> None:
        last.update((key, line[key]) for key in ("loss", "heldout_loss") if line.get(key) is not None)
        if show:
            show(line)

    monitor = Monitor(configuration.output, state.step, show_and_keep) if replicas.is_first else None
    dtype = state.encoder.compute_dtype or torch.float32
    ceiling = Ceiling(partial(measure_ceiling, state.encoder.config, dtype, replicas.device))
    run = Run(configuration, phases, objective, checkpoints, replicas, monitor, signals, ceiling)
    result: dict[str, Any] = {"message": ""}
    try:
        result["status"] = train(run, state)
    except Diverged as error:
        # Every worker comes here at the same step. Raised, it would be tried again, and end the same way.
        checkpoints.wait()
        result |= {"status": "diverged", "message": str(error)}
    finally:
        if monitor:
            monitor.close(plot=True)
    return result | {"step": state.step, "tokens": state.tokens, "last": last}
