"""What a training is at a step: weights, moments, where the stream stands. Made new, taken down into a checkpoint, and
brought back, on however many workers there are then.
"""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FileSystem, LocalFileSystem
from torch import Tensor, nn

from jobs.checkpoints import Checkpoint, copy_file, on_host
from jobs.phases import Phase, PretrainConfiguration, RunSettings, shape_of
from jobs.replicas import Replicas, fill, whole
from model.attention import choose_backend
from model.config import EncoderConfig
from model.decoder import CausalLanguageModel, Decoder
from model.embedder import choose_dtype
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import SINGLE, ModelFolder, read_folder
from model.growth import check as check_growth
from model.growth import extend_context, tile
from model.heads import MaskedLanguageModel
from model.losses import Pretraining
from model.optimizer import LossScale, StableAdamW, parameter_groups
from model.schedule import SpikeGuard
from model.weights import load_model, save_folder
from pipeline import storage
from pipeline.shards import Manifest, write_file
from pipeline.stream import StreamState

log = logging.getLogger(__name__)

MASKED, CAUSAL = "ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"
MODEL = "model"
"""Folder of a run with the model that came out."""
WRITTEN = "model.json"
"""Beside it: after which step it was written."""
CHANGES_WITH_PHASES = ("max_tokens", "global_theta", "extra")
"""Fields of a shape that a checkpoint may differ in."""


@dataclass(slots=True)
class State:
    """A training between two steps."""

    model: nn.Module
    """What is trained: an encoder with whatever its loss needs."""
    encoder: Encoder
    """The encoder in it."""
    module: nn.Module
    """What to call for a backward pass: the model, or what spreads it over several workers."""
    optimizer: StableAdamW
    scale: LossScale
    guard: SpikeGuard
    """One that has seen no step: what a source's begins as."""
    guards: dict[str, SpikeGuard] = field(default_factory=dict)
    """By source, for a loss that is high for one is low for another; "" where steps are of no source."""
    phase: int = 0
    """Number of the phase, from 0; as many as there are when all is done."""
    stream: StreamState = field(default_factory=StreamState)
    """In this phase."""
    step: int = 0
    """Steps done in all phases."""
    tokens: int = 0
    """Real tokens seen."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Mean of the weights while the rate fell; empty before."""
    averaged: int = 0
    """How many it is the mean of."""

    def enter(self, phase: Phase) -> None:
        """Make the model what a phase wants; also when it goes on in the middle of it."""
        theta = phase.settings.global_theta or self.encoder.config.global_theta
        extend_context(self.encoder, max_tokens=phase.settings.max_tokens, global_theta=theta)
        for group in self.optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = phase.settings.weight_decay

    def guard_of(self, source: str) -> SpikeGuard:
        return self.guards.setdefault(source, dataclasses.replace(self.guard))

    @torch.no_grad()
    def take_into_average(self) -> None:
        self.averaged += 1
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), 1 / self.averaged)
            else:
                self.average[name] = parameter.detach().clone()

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights and their average."""
        for name, parameter in self.model.named_parameters():
            current = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(current)


def starting_shape(configuration: PretrainConfiguration, manifest: Manifest) -> EncoderConfig:
    """The shape that a run has, known without a weight.

    Raises:
        InputError: no model there, one with fewer rows than the shards have tokens, or one that cannot grow into it.
    """
    settings = configuration.model
    if settings.start is None:
        shape = shape_of(settings, manifest, causal=configuration.objective.task == "causal")
        if settings.tile_from is not None:
            check_growth(tiled_folder(configuration).config, shape)
        return shape
    folder = starting_folder(configuration)
    if folder.config.vocab_size < manifest.vocab_size:
        raise InputError(
            f"{settings.start} has {folder.config.vocab_size} rows and the token shards ids up to "
            f"{manifest.vocab_size - 1}; prepare them with the model's tokenizer"
        )
    return folder.config


def starting_folder(configuration: PretrainConfiguration) -> ModelFolder:
    """The model to start from.

    Raises:
        InputError: none there, or an encoder where a decoder is wanted, or the other way about.
    """
    assert configuration.model.start is not None
    causal = configuration.objective.task == "causal"
    return read_folder(storage.local_model(configuration.model.start), causal=causal)


def tiled_folder(configuration: PretrainConfiguration) -> ModelFolder:
    """The smaller model to grow out of.

    Raises:
        InputError: none there, one without a masked-token head, or a decoder is wanted.
    """
    place = configuration.model.tile_from
    assert place is not None
    if configuration.objective.task == "causal":
        raise InputError("model.tile_from is for encoders; leave it out with the task 'causal'")
    folder = read_folder(storage.local_model(place))
    if folder.architecture != MASKED:
        raise InputError(f"{place} has no masked-token head ({folder.architecture}); take a pretrained model")
    return folder


def begin(configuration: PretrainConfiguration, manifest: Manifest, replicas: Replicas) -> State:
    """The state before the first step: every worker makes the same.

    Raises:
        InputError: a model to start from that cannot be read or does not fit.
    """
    work, settings = configuration.work, configuration.model
    dtype, reason = choose_dtype(work.dtype, replicas.device)
    options: dict[str, Any] = {"attention": work.attention, "dtype": dtype, "device": replicas.device}
    shape = starting_shape(configuration, manifest)
    generator = torch.Generator().manual_seed(configuration.seed)
    language_model: MaskedLanguageModel | CausalLanguageModel
    if settings.start is not None:
        loaded = load_model(starting_folder(configuration), architecture_of(shape), **options)
        assert isinstance(loaded, MaskedLanguageModel | CausalLanguageModel)
        language_model = loaded.float()
    else:
        # Drawn on the host, so that every device starts from the same weights.
        language_model = language_model_of(shape, dtype)
        init_weights(language_model, shape, generator)
        if settings.tile_from is not None:
            small = load_model(tiled_folder(configuration), MASKED)
            assert isinstance(small, MaskedLanguageModel)
            assert isinstance(language_model, MaskedLanguageModel)
            tile(small.float(), language_model)
        encoder = language_model.model
        encoder.attention, encoder.attention_reason = choose_backend(
            work.attention, device=replicas.device, dtype=dtype, head_size=shape.head_size
        )
    log.info("computing in %s: %s", str(dtype).removeprefix("torch."), reason)
    objective = configuration.objective
    model = Pretraining(language_model, ordering=objective.ordering_weight > 0, z_weight=objective.z_weight)
    if model.ordering is not None:
        init_weights(model.ordering, shape, generator)
    model.to(replicas.device)
    language_model.model.checkpoint_activations = work.checkpoint_activations
    if work.compile:
        for layer in language_model.model.layers:
            layer.compile(dynamic=True)
    module = replicas.spread(model)
    optimizer = StableAdamW(
        parameter_groups(model, 0.0),
        lr=0.0,
        peak_lr=1.0,
        betas=(configuration.optimizer.beta_1, configuration.optimizer.beta_2),
        eps=configuration.optimizer.eps,
    )
    guard = SpikeGuard(deviations=configuration.optimizer.spike_deviations)
    return State(model, language_model.model, module, optimizer, LossScale.of(dtype), guard)


def architecture_of(shape: EncoderConfig) -> str:
    return CAUSAL if shape.causal else MASKED


def language_model_of(
    shape: EncoderConfig, dtype: torch.dtype | None = None
) -> MaskedLanguageModel | CausalLanguageModel:
    """An encoder or a decoder with its head, without weights that mean anything."""
    if shape.causal:
        return CausalLanguageModel(Decoder(shape, attention="blocks", dtype=dtype))
    return MaskedLanguageModel(Encoder(shape, attention="blocks", dtype=dtype))


def take_down(
    state: State,
    configuration: RunSettings,
    phases: tuple[Phase, ...],
    facts: Mapping[str, Any],
    first: bool,
) -> Checkpoint | None:
    """A checkpoint of this state, on the first worker; the others take part where tensors are sharded.

    Args:
        facts: what else a run that goes on must find as it was (`Objective.facts`).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        parts: dict[str, Tensor] = {"weights": parameter}
        if parameter.requires_grad:
            parts["first"], parts["second"] = state.optimizer.moments(parameter)
        if state.average:
            parts["average"] = state.average[name]
        for kind, part in parts.items():
            tensor = whole(part)
            if first:
                tensors[f"{kind}.{name}"] = on_host(tensor)
    if not first:
        return None
    # Nothing here draws from torch's generator; what somebody adds to a model may.
    tensors["rng"] = torch.get_rng_state()
    record = {
        "phase": state.phase,
        "stream": dataclasses.asdict(state.stream),
        "tokens": state.tokens,
        "optimizer_steps": state.optimizer.steps,
        "scale": dataclasses.asdict(state.scale),
        "guards": {source: dataclasses.asdict(guard) for source, guard in state.guards.items()},
        "averaged": state.averaged,
        "shape": state.encoder.config.to_hf(),
        "seed": configuration.seed,
        "phases": [[phase.name, phase.settings.model_dump()] for phase in phases],
        "facts": dict(facts),
    }
    return Checkpoint(state.step, tensors, record)


def bring_back(state: State, checkpoint: Checkpoint) -> None:
    """Set a new state to what a checkpoint has; all workers read the same."""
    record, tensors = checkpoint.record, checkpoint.tensors
    state.step, state.phase, state.tokens = checkpoint.step, record["phase"], record["tokens"]
    state.stream = StreamState(**record["stream"])
    # One that float16 has lowered, or raised, is kept. A checkpoint of another type has none to take over.
    before = record["scale"]
    if state.scale.active and before.get("active", before["value"] > 1):
        state.scale = LossScale(before["value"], before["good_steps"], active=True)
    # Checkpoints of before there was one for each source have "guard".
    for source, seen in (record["guards"] if "guards" in record else {"": record["guard"]}).items():
        remembered = {name: seen[name] for name in ("losses", "norms", "skipped")}
        state.guards[source] = dataclasses.replace(state.guard, **remembered)
    state.averaged = record["averaged"]
    state.optimizer.steps = record["optimizer_steps"]
    for name, parameter in state.model.named_parameters():
        fill(parameter, tensors[f"weights.{name}"])
        if parameter.requires_grad:
            for kind, part in zip(("first", "second"), state.optimizer.moments(parameter), strict=True):
                fill(part, tensors[f"{kind}.{name}"])
        if state.averaged:
            state.average[name] = torch.empty_like(parameter, requires_grad=False)
            fill(state.average[name], tensors[f"average.{name}"])
    torch.set_rng_state(tensors["rng"])


def checkpoint_bytes(shape: EncoderConfig, *, average: bool) -> int:
    """About what a checkpoint takes on a disk: weights and two moments in float32, and an average."""
    count = shape.num_parameters() + shape.hidden_size * (shape.hidden_size + 1) + shape.vocab_size
    return 4 * count * (4 if average else 3)


def check_resumable(
    record: Mapping[str, Any],
    shape: EncoderConfig,
    configuration: RunSettings,
    phases: tuple[Phase, ...],
    facts: Mapping[str, Any],
) -> None:
    """See that a run with these settings may go on from a checkpoint.

    Raises:
        InputError: it is of another model, seed or objective, or has trained other phases than these.
    """
    again = "use the old settings, or another output for a new run"
    before = EncoderConfig.from_hf(record["shape"])
    for item in dataclasses.fields(EncoderConfig):
        old, new = getattr(before, item.name), getattr(shape, item.name)
        if item.name not in CHANGES_WITH_PHASES and old != new:
            raise InputError(f"the checkpoint is of another architecture: {item.name} is {old}, not {new}; {again}")
    for name, value in facts.items():
        # What a checkpoint does not know was no fact yet when it was written.
        if record["facts"].get(name, value) != value:
            raise InputError(f"the run began with {name} {record['facts'][name]}, not {value}; {again}")
    if record["seed"] != configuration.seed:
        raise InputError(f"the run began with seed {record['seed']}, not {configuration.seed}; {again}")
    trained = record["phases"][: record["phase"] + 1]
    for number, (name, settings) in enumerate(trained):
        if number >= len(phases) or phases[number].name != name:
            raise InputError(
                f"the checkpoint stands in phase {trained[-1][0]!r}, which cannot be reached: phase {number} of the "
                f"configuration is not {name!r}; {again}"
            )
        for key, value in phases[number].settings.model_dump().items():
            # Of the phase in progress the end may move, as long as it lies ahead.
            may_move = number == record["phase"] and key in ("tokens", "decay_tokens", "average_every")
            if value != settings.get(key) and not may_move:
                raise InputError(
                    f"phase {name!r} was trained with {key} {settings.get(key)}, not {value}, as far as the checkpoint "
                    f"goes; {again}"
                )
    if record["phase"] < len(phases) and record["stream"]["step"] > phases[record["phase"]].num_steps:
        raise InputError(
            f"the checkpoint stands at step {record['stream']['step']} of phase {trained[-1][0]!r}, which ends at "
            f"{phases[record['phase']].num_steps}; give the phase its tokens again"
        )


def save_model(state: State, output: str, tokenizer_folder: str, *, first: bool) -> None:
    """Write the model folder of a pretraining, OUTPUT/model; all workers take part where weights are sharded."""
    model = state.model
    assert isinstance(model, Pretraining)
    weights = whole_weights(model.language_model, first=first)
    if not first:
        return
    with torch.device("meta"):
        plain = language_model_of(state.encoder.config)
    plain.load_state_dict(weights, assign=True, strict=False)  # the tied decoder has no weight of its own
    if state.encoder.config.tie_word_embeddings:
        plain.decoder.weight = plain.model.embeddings.tok_embeddings.weight
    write_model(output, state.step, lambda folder: save_folder(plain, folder, tokenizer_from=tokenizer_folder))


def whole_weights(module: nn.Module, *, first: bool) -> dict[str, Tensor]:
    """The parameters on the host, on the first worker; the others take part where they are sharded."""
    return {name: on_host(p) for name, p in ((n, whole(p)) for n, p in module.named_parameters()) if first}


def write_model(output: str, step: int, write: Callable[[str | Path], Path]) -> None:
    """Have a model folder written to OUTPUT/model, local or on S3, and then say beside it which step it is of.

    Args:
        write: writes it to the local folder that it is given, and returns that.
    """
    files, path = storage.filesystem(output)
    if isinstance(files, LocalFileSystem):
        write(f"{path}/{MODEL}")
    else:
        upload_model(files, f"{path}/{MODEL}", write)
    write_file(output, WRITTEN, json.dumps({"step": step}).encode() + b"\n")


def has_model(output: str, step: int) -> bool:
    """Whether a run has written its model after this step, and it is still there."""
    files, path = storage.filesystem(output)
    found = files.get_file_info([f"{path}/{WRITTEN}", *(f"{path}/{MODEL}/{name}" for name in ("config.json", SINGLE))])
    if not all(info.is_file for info in found):
        return False
    with files.open_input_stream(found[0].path) as stream:
        return bool(json.loads(stream.read())["step"] == step)


def upload_model(files: FileSystem, target: str, write: Callable[[str | Path], Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="nightloom-model-") as folder:
        written = write(Path(folder) / MODEL)
        names = [file.relative_to(written).as_posix() for file in written.rglob("*") if file.is_file()]
        # Last what makes it a model: without it, nothing that is there counts.
        for name in sorted(names, key=lambda name: (name == "config.json", name)):
            copy_file(LocalFileSystem(), str(written / name), files, f"{target}/{name}")
