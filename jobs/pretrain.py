"""`nightloom pretrain`: an encoder or a decoder out of token shards, on workers that may come and go meanwhile."""

from collections.abc import Callable, Mapping
from typing import Any

from jobs.checkpoints import Checkpoints
from jobs.group import TrainingReport, member, run_group
from jobs.objective import LanguageModelling, facts_of
from jobs.phases import Phase, PretrainConfiguration, plan_phases
from jobs.replicas import Replicas
from jobs.state import begin, check_resumable, checkpoint_bytes, starting_folder, starting_shape, tiled_folder
from jobs.training import Signals, resume
from model.errors import InputError
from model.folder import tokenizer_hash
from pipeline.shards import TokenShards


def run_pretrain(configuration: PretrainConfiguration) -> TrainingReport:
    """Train, or go on with training.

    Raises:
        InputError: shards, a model, a checkpoint or settings that do not belong together, or too little disk.
        Diverged, KeyboardInterrupt: as `run_group` does.
    """
    return run_group("pretrain", work_on, configuration, check(configuration))


def check(configuration: PretrainConfiguration) -> tuple[Phase, ...]:
    """Everything that can be wrong before a worker starts.

    Raises:
        InputError: it is.
    """
    phases = plan_phases(configuration)
    work, keep = configuration.work, configuration.keep
    start, tile_from = configuration.model.start, configuration.model.tile_from
    if work.min_workers is not None and work.min_workers > work.workers:
        raise InputError(f"work.min_workers {work.min_workers} is more than work.workers {work.workers}")
    if start is not None and tile_from is not None:
        raise InputError("model.start and model.tile_from are both given; weights can come from one place only")
    checkpoints = Checkpoints(configuration.output, keep.checkpoints)
    steps = checkpoints.steps()
    record = checkpoints.read_record(steps[-1]) if steps else None
    folder = starting_folder(configuration) if start is not None else None
    if tile_from is not None:
        folder = tiled_folder(configuration)
    tokenizer = tokenizer_hash(folder.path) if folder and (folder.path / "tokenizer.json").exists() else None
    fingerprint = record["facts"].get("manifest") if record else None
    shards = TokenShards.open(configuration.tokens, tokenizer=tokenizer, fingerprint=fingerprint)
    shape = starting_shape(configuration, shards.manifest)
    if record:
        check_resumable(record, shape, configuration, phases, facts_of(configuration.objective))
    average = any(phase.settings.average_every for phase in phases)
    checkpoints.check_space(checkpoint_bytes(shape, average=average))
    return phases


def work_on(job: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker runs, from the latest checkpoint to the end."""
    configuration = PretrainConfiguration.model_validate(job["configuration"])
    replicas, signals = member(job, configuration)
    return go_on(configuration, replicas, signals, signals.post)


def go_on(
    configuration: PretrainConfiguration,
    replicas: Replicas,
    signals: Signals,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train from the latest checkpoint of a run, or from its beginning, with Ray or without; as `resume` does."""
    shards = TokenShards.open(configuration.tokens)
    objective = LanguageModelling(shards, configuration.objective, configuration.keep.evaluation_bins)
    state = begin(configuration, shards.manifest, replicas)
    return resume(configuration, plan_phases(configuration), objective, state, replicas, signals, show)
