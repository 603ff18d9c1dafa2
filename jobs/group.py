"""A group of workers under Ray Train, whatever they train: started, watched, told to stop, and reported on.

Ray Train places the workers, joins them and replaces them; it knows nothing of checkpoints. Whenever a group starts,
for the first time, after a death or after a change of size, it goes on from the latest checkpoint in the run's folder:
so a run that was killed altogether is resumed by the same command, and by the same code.
"""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import torch

from cluster.session import allowed_cpus, local_cpus, session
from jobs.checkpoints import Checkpoints
from jobs.monitor import Display
from jobs.phases import Phase, RunSettings
from jobs.replicas import Replicas
from jobs.report import clock, line
from jobs.state import has_model
from jobs.training import Diverged, Signals
from pipeline.shards import write_file
from pipeline.storage import is_s3

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""How often the workers look together whether a machine is about to be taken away."""
FIXED_START_S, ELASTIC_START_S = 600, 30
"""How long Ray waits for the places of all workers. A group of one size waits for machines that boot, or are busy. One
that may shrink must not: Ray hears of a machine's death late, asks for a place on it, and only when this is over looks
again how many there are.
"""
SETTINGS = "configuration.json"
PLACES = ("output", "tokens", "start", "tile_from", "path")
"""Settings that may be local paths."""

MOST_LINES = 10_000
"""That wait for the driver, which asks twice a second."""

Loop = Callable[[Mapping[str, Any]], dict[str, Any]]
"""What each worker runs: gets "configuration" (as a dictionary) and what `member` reads; returns what `resume` does."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a job that trains did."""

    job: str
    status: str
    """done: the model is written; stopped: a checkpoint is; unchanged: it was done before."""
    output: str
    steps: int
    """In all phases and all runs of this output."""
    tokens: int
    loss: float | None
    """Of the last step."""
    heldout_loss: float | None
    """Of the last evaluation."""
    seconds: float
    """Of this run."""
    repeated_steps: int = 0
    """Taken again in this run, because a machine was lost after the checkpoint before them."""
    wasted_tokens: int = 0
    """What they had learned from."""

    def summary(self) -> str:
        head = {
            "done": f"{self.steps:,} steps; the model is in {self.output}/model.",
            "stopped": f"Stopped after step {self.steps:,} with a checkpoint; the same command goes on, to stop_after.",
            "unchanged": f"Nothing to train: all {self.steps:,} steps of {self.output} are done.",
        }[self.status]
        lines = [head, "", line("tokens", f"{self.tokens:,}")]
        lines += [line("loss", f"{self.loss:.4f}")] if self.loss is not None else []
        lines += [line("held out", f"{self.heldout_loss:.4f}")] if self.heldout_loss is not None else []
        if self.repeated_steps:
            share = self.wasted_tokens / max(self.tokens + self.wasted_tokens, 1)
            lines.append(line("repeated", f"{self.repeated_steps:,} steps, {share:.1%} of all tokens"))
        return "\n".join([*lines, line("time", clock(self.seconds))])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_group(
    name: str, loop: Loop, configuration: RunSettings, phases: tuple[Phase, ...], **shared: Any
) -> TrainingReport:
    """Train under Ray Train, from wherever the output stands. Everything that can be wrong was checked before.

    Args:
        name: of the job, for its report.
        shared: large things that the driver has read; a `Loop` finds them in its job as references (`ray.get`).

    Raises:
        Diverged: a loss or a gradient is no number.
        KeyboardInterrupt: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    started, output, work = time.monotonic(), configuration.output, configuration.work
    checkpoints = Checkpoints(output, configuration.keep.checkpoints)
    steps = checkpoints.steps()
    record = checkpoints.read_record(steps[-1]) if steps else {}
    if record.get("phase") == len(phases) and has_model(output, steps[-1]):
        seconds = round(time.monotonic() - started, 1)
        return TrainingReport(name, "unchanged", output, steps[-1], record["tokens"], None, None, seconds)
    write_file(output, SETTINGS, configuration.model_dump_json(indent=1).encode() + b"\n")
    with session(work.address, num_cpus=max(local_cpus(), work.workers + 1)):
        references = {key: ray.put(value) for key, value in shared.items()}
        repeats = Repeats()
        result = fit(loop, configuration, Display(sum(phase.num_steps for phase in phases)), repeats, references)
    if result["status"] == "diverged":
        raise Diverged(result["message"])
    return TrainingReport(
        job=name,
        status=result["status"],
        output=output,
        steps=result["step"],
        tokens=result["tokens"],
        loss=result["last"].get("loss"),
        heldout_loss=result["last"].get("heldout_loss"),
        seconds=round(time.monotonic() - started, 1),
        repeated_steps=repeats.steps,
        wasted_tokens=repeats.tokens,
    )


@dataclass(slots=True)
class Repeats:
    """Steps that a run took more than once, out of the lines that it posted."""

    steps: int = 0
    tokens: int = 0
    taken: list[tuple[int, int]] = field(default_factory=list)
    """(step, tokens up to its end) of what counts so far."""

    def add(self, posted: Mapping[str, Any]) -> None:
        """A step's line. After one that is no successor, what had come from there on was for nothing."""
        while self.taken and self.taken[-1][0] >= posted["step"]:
            _, reached = self.taken.pop()
            self.steps += 1
            if self.taken:  # what the first line that came had begun with is not known
                self.tokens += reached - self.taken[-1][1]
        self.taken.append((posted["step"], posted["tokens"]))


def anchored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with whole local paths: Ray Train's workers have another working directory than the driver."""
    whole: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            whole[key] = anchored(value)
        elif (
            key in PLACES and isinstance(value, str) and not is_s3(value) and (key == "output" or Path(value).exists())
        ):
            whole[key] = str(Path(value).expanduser().absolute())
        else:  # a hub id, too
            whole[key] = value
    return whole


class Board:
    """An actor between the driver and the first worker: lines one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.stopping = False

    def post(self, line: dict[str, Any]) -> bool:
        self.lines = [*self.lines, line][-MOST_LINES:]
        return self.stopping

    def take(self) -> list[dict[str, Any]]:
        lines, self.lines = self.lines, []
        return lines

    def stop(self) -> None:
        self.stopping = True


class RaySignals(Signals):
    """Preemption notices of Ray, machines that come, and the driver's wish to stop.

    Args:
        board: see `Board`.
        first: whether this is the first worker, which hears for all.
        room: what one worker takes, where the group may grow.
    """

    def __init__(self, board: Any, *, first: bool, room: Mapping[str, float] | None = None) -> None:
        self.board, self.first, self.room = board, first, room
        self.machines = machines() if room else frozenset()
        self.answer: Any = None
        self.stopping = False
        self.looked = time.monotonic()
        self.saved_for: tuple[str, ...] = ()

    def post(self, line: dict[str, Any]) -> None:
        """Send a line; the answer to the one before says whether to stop. Nothing here waits."""
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            self.stopping = bool(ray.get(self.answer)) or self.stopping
            self.answer = None
        answer = self.board.post.remote(line)
        self.answer = self.answer or answer

    def due(self) -> bool:
        return self.first and (self.stopping or time.monotonic() - self.looked >= LOOK_EVERY_S)

    def look(self) -> str | None:
        self.looked = time.monotonic()
        news = "stop" if self.stopping else "save" if self.first and self.room and self.has_come(self.room) else None
        if news := ray.train.collective.broadcast_from_rank_zero(news):
            return str(news)
        notice = ray.train.get_preemption_info()
        nodes = tuple(notice.preempted_node_ids) if notice else ()
        if nodes and nodes != self.saved_for:
            # Go on afterwards: the machine may stay for minutes, and what is trained until then is not lost for sure.
            self.saved_for = nodes
            log.warning("a checkpoint is written because %d machines will be taken away", len(nodes))
            return "save"
        return None

    def has_come(self, room: Mapping[str, float]) -> bool:
        """Whether there is a new machine, and room for another worker: Ray Train will soon start a larger group from
        the last checkpoint, without a word.
        """
        now = machines()
        free = ray.available_resources() if now - self.machines else {}
        if not free or any(free.get(name, 0) < amount for name, amount in room.items()):
            return False
        self.machines = now
        log.info("a checkpoint is written because there is room for another worker")
        return True


def machines() -> frozenset[str]:
    """Ids of the cluster's machines."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def fit(
    loop: Loop,
    configuration: RunSettings,
    display: Display,
    repeats: Repeats,
    references: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Have Ray Train do it, showing and counting lines meanwhile; what the first worker returned."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    work = configuration.work
    elastic = work.min_workers is not None and work.min_workers < work.workers
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S if elastic else FIXED_START_S)
    use_gpu = work.device == "cuda" or (work.device == "auto" and torch.cuda.is_available())
    cpus = work.cpus_per_worker or (1 if use_gpu else max(1, allowed_cpus() // work.workers))
    room = {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})
    # On this machine: it must outlive the machines that leave.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    # After an interrupt Ray Train may still be writing there.
    with tempfile.TemporaryDirectory(prefix="nightloom-train-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            loop,
            train_loop_config={
                "configuration": anchored(configuration.model_dump()),
                "board": board,
                "use_gpu": use_gpu,
                "room": room,
                **references,
            },
            scaling_config=ScalingConfig(
                num_workers=work.workers if work.min_workers is None else (work.min_workers, work.workers),
                use_gpu=use_gpu,
                resources_per_worker=room,
                elastic_resize_monitor_interval_s=work.resize_every_s,
            ),
            # Ray Train keeps nothing here: checkpoints are the run's own.
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=work.max_failures)),
        )
        try:
            with stop_wishes() as wishes:
                # Beside the main thread, where Ray would answer Ctrl-C itself by killing the workers.
                future = in_thread(trainer.fit)
                ended = False
                while not ended:
                    ended = bool(wait([future], timeout=0.5).done)
                    for posted in ray.get(board.take.remote()):
                        show(display, posted)
                        repeats.add(posted)
                    if wishes.is_set():
                        board.stop.remote()
            result = future.result().return_value
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            raise (failures[0] if failures else error) from error
        finally:
            display.close()
            ray.kill(board)
    if wishes.is_set() and result["status"] == "stopped":
        raise KeyboardInterrupt
    return result


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """What a call will have returned, from a thread that nothing waits for: a second Ctrl-C leaves it behind, and the
    end of the Ray session ends what it was about. The pool of `concurrent.futures` would be waited for.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again by whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future


def show(display: Display, posted: Mapping[str, Any]) -> None:
    """Show a line. What cannot be shown ends no training."""
    try:
        display.show(posted)
    except Exception:
        log.warning("the line of step %s cannot be shown; training goes on", posted.get("step"), exc_info=True)


@contextmanager
def stop_wishes() -> Iterator[threading.Event]:
    """Set on SIGTERM or Ctrl-C; a second one of them interrupts at once."""
    wish = threading.Event()

    def note(number: int, frame: Any) -> None:
        if wish.is_set():
            raise KeyboardInterrupt
        wish.set()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def member(job: Mapping[str, Any], configuration: RunSettings) -> tuple[Replicas, RaySignals]:
    """Who this worker is, and what it hears; called in a `Loop`. Lines go to `RaySignals.post`."""
    import ray.train.collective
    import ray.train.torch

    context = ray.train.get_context()
    replicas = Replicas(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device() if job["use_gpu"] else torch.device("cpu"),
        configuration.work.strategy,
    )
    grows = replicas.size < configuration.work.workers
    return replicas, RaySignals(job["board"], first=replicas.is_first, room=job["room"] if grows else None)
