"""What a pretraining run is: its settings, and the phases that follow from them, each with its stream and its schedule.

A phase is a number of tokens under one length of sequences, one theta and one trapezoid. Everything here is settled
before the first step and follows from the settings alone, so that a mistake is found on the driver, at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from jobs.configuration import Settings
from model.config import EncoderConfig, preset
from model.errors import InputError
from model.schedule import Trapezoid
from pipeline.masking import MaskingConfig
from pipeline.shards import Manifest
from pipeline.stream import StreamConfig


class ModelSettings(Settings):
    """What is trained."""

    start: str | None = None
    """Model folder (s3:// too) or hub id whose weights to start from; by default random weights."""
    tile_from: str | None = None
    """Folder of a smaller model whose weights fill a larger one, centred and repeated."""
    preset: str = "base"
    """Published shape of a model that starts from random or tiled weights."""
    hidden_size: int | None = Field(default=None, gt=0)
    """Width; by default the preset's."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Width of the gated hidden layer; by default the preset's."""
    num_layers: int | None = Field(default=None, gt=0)
    """Layers; by default the preset's."""
    num_heads: int | None = Field(default=None, gt=0)
    """Attention heads; by default the preset's."""
    local_attention: int | None = Field(default=None, gt=0)
    """Width of the sliding window, both sides together; by default the preset's."""


class ObjectiveSettings(Settings):
    """What is learned."""

    task: Literal["masked", "causal"] = "masked"
    """To guess masked tokens, which makes an encoder, or the next token, which makes a decoder."""
    mask_rate: float = 0.3
    """Share of the tokens to predict."""
    final_mask_rate: float | None = None
    """The share at the end of a phase, reached in a straight line; by default it stays."""
    mask_share: float = 0.8
    """Share of the chosen tokens that the model sees as [MASK]."""
    random_share: float = 0.1
    """Share of the chosen tokens that it sees as random ones; the rest stays as it was."""
    evaluation_mask_rate: float = 0.3
    """Share for held-out text, whose masks never change."""
    ordering_weight: float = Field(default=0.0, ge=0)
    """Weight of sentence ordering beside masked tokens; 0 leaves the task and its head out."""
    z_weight: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2 in the masked-token loss, which keeps logits from drifting."""


class OptimizerSettings(Settings):
    """StableAdamW, and what a step may not do."""

    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradients' average."""
    beta_2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the squared gradients' average."""
    eps: float = Field(default=1e-6, gt=0)
    """Smallest divisor of an update."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a longer one is shortened to it."""
    spike_deviations: float = Field(default=6.0, ge=0)
    """A step whose loss or gradient norm lies so many deviations above the last ones is skipped; 0 skips none."""


class PhaseSettings(Settings):
    """One phase. Tokens are nominal: bins times their budget."""

    tokens: int = Field(gt=0)
    """How long the phase is."""
    max_tokens: int = 1024
    """Longest sequence, special tokens included; documents are cut to it."""
    global_theta: float | None = Field(default=None, gt=0)
    """Theta of the rotary positions in global layers; by default it stays as it is."""
    tokens_per_bin: int = 16_384
    """Tokens that go through the model at once."""
    tokens_per_step: int = 131_072
    """Tokens of an optimizer step, over all workers."""
    first_tokens_per_step: int | None = Field(default=None, gt=0)
    """Tokens of the first steps, from where the batch grows; by default it does not."""
    batch_warmup_tokens: int = Field(default=0, ge=0)
    """Tokens over which the batch grows to `tokens_per_step`."""
    learning_rate: float = Field(default=8e-4, gt=0)
    """The highest rate."""
    warmup_tokens: int = Field(default=0, ge=0)
    """Tokens over which the rate rises, at the beginning."""
    decay_tokens: int = Field(default=0, ge=0)
    """Tokens over which the rate falls as 1 - sqrt, at the end."""
    weight_decay: float = Field(default=1e-5, ge=0, lt=1)
    """Share of the weights that a step at the highest rate takes off."""
    average_every: int = Field(default=0, ge=0)
    """Steps between weights that enter an average while the rate falls; 0 for no average. Only the last phase's is
    written, and only where it is better on held-out text."""


class WorkSettings(Settings):
    """Where the work is done."""

    address: str | None = None
    """Ray cluster to use ("auto" for the one this machine belongs to); by default a local one is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained."""
    workers: int = Field(default=1, gt=0)
    """Processes that train together, at most; on GPUs each has one."""
    min_workers: int | None = Field(default=None, gt=0)
    """Fewest to go on with when machines leave; by default all are needed."""
    cpus_per_worker: int | None = Field(default=None, gt=0)
    """Logical CPUs of each; by default this machine's, shared out, or 1 beside a GPU."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Whole weights on every worker, or weights and optimizer split among them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What matrix products compute in; weights and optimizer stay in float32."""
    attention: str = "auto"
    """Attention back-end."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the layers with torch.compile, which takes minutes at first."""
    max_failures: int = Field(default=3, ge=-1)
    """How often dead workers are replaced before the run is given up; -1 for without end."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """How often to look whether there are machines for more workers."""


class KeepSettings(Settings):
    """What is kept, and how often a look is taken."""

    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints: what a crash can cost at most."""
    checkpoints: int = Field(default=2, gt=0)
    """How many of the latest checkpoints stay."""
    evaluate_every: int = Field(default=500, ge=0)
    """Steps between evaluations on held-out text; 0 evaluates at the end of each phase only."""
    evaluation_bins: int | None = Field(default=64, gt=0)
    """Bins of held-out text for an evaluation, of each source where there are several; none takes all."""


class RunSettings(Settings):
    """What every job that trains can be told, whatever it learns."""

    output: str
    """Folder or s3:// prefix of the run: its checkpoints, its metrics, and at the end its model."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the order of the documents and the masks."""
    stop_after: int | None = Field(default=None, gt=0)
    """Stop after so many steps in all, with a checkpoint; the same command without it, or with more, goes on."""
    optimizer: OptimizerSettings = OptimizerSettings()
    work: WorkSettings = WorkSettings()
    keep: KeepSettings = KeepSettings()


class PretrainConfiguration(RunSettings):
    """Everything that `nightloom pretrain` can be told."""

    tokens: str
    """Token shards, local or s3://, as `nightloom prepare` wrote them."""
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    phases: dict[str, PhaseSettings] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase, worked out."""

    name: str
    settings: PhaseSettings
    stream: StreamConfig
    schedule: Trapezoid
    num_steps: int

    def rate_at(self, bins_done: int) -> float:
        """Learning rate of the step that begins after so many bins of this phase."""
        before = bins_done * self.stream.tokens_per_bin
        return self.schedule.rate(before, before + self.stream.bins_at(bins_done) * self.stream.tokens_per_bin)

    def is_decaying(self, bins_done: int) -> bool:
        start = self.schedule.tokens - self.schedule.decay_tokens
        return self.schedule.decay_tokens > 0 and bins_done * self.stream.tokens_per_bin >= start


def plan_phases(configuration: PretrainConfiguration) -> tuple[Phase, ...]:
    """The phases in their order.

    Raises:
        InputError: a phase without a whole step, or with parts that do not fit together.
    """
    objective, phases = configuration.objective, []
    if objective.task == "causal" and objective.ordering_weight:
        raise InputError("objective.ordering_weight is for encoders; set it to 0 with the task 'causal'")
    masking = MaskingConfig(
        rate=objective.mask_rate,
        final_rate=objective.final_mask_rate,
        mask_share=objective.mask_share,
        random_share=objective.random_share,
        evaluation_rate=objective.evaluation_mask_rate,
    )
    for number, (name, settings) in enumerate(configuration.phases.items()):
        try:
            # Every phase has an order and masks of its own: it does not go over the same bins again.
            stream = StreamConfig(
                max_tokens=settings.max_tokens,
                tokens_per_bin=settings.tokens_per_bin,
                tokens_per_step=settings.tokens_per_step,
                first_tokens_per_step=settings.first_tokens_per_step,
                warmup_tokens=settings.batch_warmup_tokens,
                seed=configuration.seed + number,
                num_steps=1,
                ordering=objective.ordering_weight > 0,
                causal=objective.task == "causal",
                masking=masking,
            )
            steps = count_steps(stream, settings.tokens)
            if steps == 0:
                raise InputError(
                    f"its {settings.tokens} tokens are less than its first step takes, so that it is never reached; "
                    "give it more tokens or smaller steps"
                )
            schedule = Trapezoid(settings.learning_rate, settings.tokens, settings.warmup_tokens, settings.decay_tokens)
        except InputError as error:
            raise InputError(f"phase {name!r}: {error}") from None
        phases.append(Phase(name, settings, dataclasses.replace(stream, num_steps=steps), schedule, steps))
    return tuple(phases)


def count_steps(stream: StreamConfig, tokens: int) -> int:
    """Whole steps in so many nominal tokens; the batch may grow on the way."""
    total, bins, steps = tokens // stream.tokens_per_bin, 0, 0
    while bins * stream.tokens_per_bin < stream.warmup_tokens and bins + stream.bins_at(bins) <= total:
        bins, steps = bins + stream.bins_at(bins), steps + 1
    return steps + max(total - bins, 0) // stream.bins_at(bins)


def shape_of(settings: ModelSettings, manifest: Manifest, *, causal: bool = False) -> EncoderConfig:
    """The shape of a model that starts from random or tiled weights, for the vocabulary of the shards."""
    changes: dict[str, Any] = {
        name: value
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "local_attention")
        if (value := getattr(settings, name)) is not None
    }
    return preset(
        settings.preset,
        **changes,
        # A multiple of 64 suits matrix products; the rows beyond the vocabulary are never met.
        vocab_size=-(-manifest.vocab_size // 64) * 64,
        pad_id=manifest.pad_id,
        cls_id=manifest.cls_id,
        sep_id=manifest.sep_id,
        causal=causal,
    )
