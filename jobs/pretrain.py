"""`nightloom pretrain`: the training loop under Ray Train, on a number of workers that may change while it runs.

Ray Train places the workers, joins them and replaces them; it knows nothing of checkpoints. Whenever a group of workers
starts, for the first time, after a death or after a change of size, it goes on from the latest checkpoint in the run's
folder: so a run that was killed altogether is resumed by the same command, and by the same code.
"""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Waiting
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch

from cluster.session import local_cpus, session
from jobs.checkpoints import Checkpoints
from jobs.monitor import Display, Monitor, measure_ceiling
from jobs.phases import Phase, PretrainConfiguration, plan_phases
from jobs.replicas import Replicas
from jobs.report import clock, line
from jobs.state import MODEL, begin, bring_back, check_resumable, checkpoint_bytes, starting_shape
from jobs.training import Diverged, Run, Signals, train
from model.errors import InputError
from model.folder import read_folder, tokenizer_hash
from pipeline.shards import TokenShards, write_file
from pipeline.storage import filesystem, local_model

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""How often the workers look together whether a machine is about to be taken away."""
SETTINGS = "configuration.json"


@dataclass(frozen=True, slots=True)
class PretrainReport:
    """What `nightloom pretrain` did."""

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

    def summary(self) -> str:
        head = {
            "done": f"{self.steps:,} steps; the model is in {self.output}/model.",
            "stopped": f"Stopped after step {self.steps:,} with a checkpoint; the same command goes on.",
            "unchanged": f"Nothing to train: all {self.steps:,} steps of {self.output} are done.",
        }[self.status]
        lines = [head, "", line("tokens", f"{self.tokens:,}")]
        lines += [line("loss", f"{self.loss:.4f}")] if self.loss is not None else []
        lines += [line("held out", f"{self.heldout_loss:.4f}")] if self.heldout_loss is not None else []
        return "\n".join([*lines, line("time", clock(self.seconds))])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Board:
    """An actor between the driver and the first worker: lines one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.stopping = False

    def post(self, line: dict[str, Any]) -> bool:
        self.lines = [*self.lines, line][-100:]
        return self.stopping

    def take(self) -> list[dict[str, Any]]:
        lines, self.lines = self.lines, []
        return lines

    def stop(self) -> None:
        self.stopping = True


class RaySignals(Signals):
    """Preemption notices of Ray, and the driver's wish to stop."""

    def __init__(self, board: Any, *, first: bool) -> None:
        self.board, self.first = board, first
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
        if ray.train.collective.broadcast_from_rank_zero(self.stopping):
            return "stop"
        notice = ray.train.get_preemption_info()
        nodes = tuple(notice.preempted_node_ids) if notice else ()
        if nodes and nodes != self.saved_for:
            # Go on afterwards: the machine may stay for minutes, and what is trained until then is not lost for sure.
            self.saved_for = nodes
            log.warning("a checkpoint is written because %d machines will be taken away", len(nodes))
            return "save"
        return None


def run_pretrain(configuration: PretrainConfiguration) -> PretrainReport:
    """Train, or go on with training.

    Raises:
        InputError: shards, a model, a checkpoint or settings that do not belong together, or too little disk.
        KeyboardInterrupt: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    started = time.monotonic()
    phases, checkpoints = check(configuration)
    total_steps = sum(phase.num_steps for phase in phases)
    steps = checkpoints.steps()
    record = checkpoints.read_record(steps[-1]) if steps else {}
    if record.get("phase") == len(phases) and has_model(configuration.output):
        seconds = round(time.monotonic() - started, 1)
        return PretrainReport(
            "pretrain", "unchanged", configuration.output, steps[-1], record["tokens"], None, None, seconds
        )
    write_file(configuration.output, SETTINGS, configuration.model_dump_json(indent=1).encode() + b"\n")
    work = configuration.work
    with session(work.address, num_cpus=max(local_cpus(), work.workers + 1)):
        result = fit(configuration, Display(total_steps))
    if result["status"] == "diverged":
        raise Diverged(result["message"])
    return PretrainReport(
        job="pretrain",
        status=result["status"],
        output=configuration.output,
        steps=result["step"],
        tokens=result["tokens"],
        loss=result["last"].get("loss"),
        heldout_loss=result["last"].get("heldout_loss"),
        seconds=round(time.monotonic() - started, 1),
    )


def has_model(output: str) -> bool:
    files, path = filesystem(output)
    return files.get_file_info(f"{path}/{MODEL}/config.json").is_file


def check(configuration: PretrainConfiguration) -> tuple[tuple[Phase, ...], Checkpoints]:
    """Everything that can be wrong before a worker starts.

    Raises:
        InputError: it is.
    """
    phases = plan_phases(configuration)
    work, keep, start = configuration.work, configuration.keep, configuration.model.start
    if work.min_workers is not None and work.min_workers > work.workers:
        raise InputError(f"work.min_workers {work.min_workers} is more than work.workers {work.workers}")
    if start is not None and configuration.model.tile_from is not None:
        raise InputError("model.start and model.tile_from are both given; weights can come from one place only")
    checkpoints = Checkpoints(configuration.output, keep.checkpoints)
    steps = checkpoints.steps()
    record = checkpoints.read_record(steps[-1]) if steps else None
    folder = read_folder(local_model(start)).path if start is not None else None
    tokenizer = tokenizer_hash(folder) if folder and (folder / "tokenizer.json").exists() else None
    fingerprint = record["manifest"] if record else None
    shards = TokenShards.open(configuration.tokens, tokenizer=tokenizer, fingerprint=fingerprint)
    shape = starting_shape(configuration, shards.manifest)
    if record:
        check_resumable(record, shape, configuration, phases)
    average = any(phase.settings.average_every for phase in phases)
    checkpoints.check_space(checkpoint_bytes(shape, average=average))
    return phases, checkpoints


def fit(configuration: PretrainConfiguration, display: Display) -> dict[str, Any]:
    """Have Ray Train do it, showing lines meanwhile; what the first worker returned."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    # Ray gives workers a minute to start; a machine that boots, or that is busy, takes longer.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    work = configuration.work
    use_gpu = work.device == "cuda" or (work.device == "auto" and torch.cuda.is_available())
    cpus = work.cpus_per_worker or (1 if use_gpu else max(1, len(os.sched_getaffinity(0)) // work.workers))
    board = ray.remote(num_cpus=0)(Board).remote()
    with tempfile.TemporaryDirectory(prefix="nightloom-train-") as folder:
        trainer = TorchTrainer(
            work_on,
            train_loop_config={"configuration": configuration.model_dump(), "board": board, "use_gpu": use_gpu},
            scaling_config=ScalingConfig(
                num_workers=work.workers if work.min_workers is None else (work.min_workers, work.workers),
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
                elastic_resize_monitor_interval_s=work.resize_every_s,
            ),
            # Ray Train keeps nothing here: checkpoints are the run's own.
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=work.max_failures)),
        )
        try:
            with ThreadPoolExecutor(1) as pool, stop_wishes() as wishes:
                # Beside the main thread, where Ray would answer Ctrl-C itself by killing the workers.
                future = pool.submit(trainer.fit)
                while not future.done():
                    try:
                        future.result(timeout=0.5)
                    except Waiting:
                        for posted in ray.get(board.take.remote()):
                            display.show(posted)
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


def work_on(job: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker runs, from the latest checkpoint to the end."""
    import ray.train.collective
    import ray.train.torch

    context = ray.train.get_context()
    configuration = PretrainConfiguration.model_validate(job["configuration"])
    replicas = Replicas(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device() if job["use_gpu"] else torch.device("cpu"),
        configuration.work.strategy,
    )
    signals = RaySignals(job["board"], first=replicas.is_first)
    return go_on(configuration, replicas, signals, signals.post)


def go_on(
    configuration: PretrainConfiguration,
    replicas: Replicas,
    signals: Signals,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train from the latest checkpoint of a run, or from its beginning; with Ray or without.

    Returns:
        status ("done", "stopped", "diverged" with its message), steps and tokens done, and the last values of loss.
    """
    phases = plan_phases(configuration)
    shards = TokenShards.open(configuration.tokens)
    state = begin(configuration, shards.manifest, replicas)
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

    encoder = state.model.language_model.model
    dtype = encoder.compute_dtype or torch.float32
    monitor = Monitor(configuration.output, state.step, show_and_keep) if replicas.is_first else None
    ceiling = measure_ceiling(encoder.config, dtype, replicas.device)
    run = Run(configuration, phases, shards, checkpoints, replicas, monitor, signals, ceiling)
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
