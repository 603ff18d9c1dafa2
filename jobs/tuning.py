"""What a fine-tuning is: its settings, and what follows from them before a weight is read."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from jobs.configuration import Names, Settings, as_names
from jobs.phases import Phase, PhaseSettings, RunSettings
from model.errors import InputError
from model.folder import ModelFolder
from model.schedule import Trapezoid
from pipeline.stream import StreamConfig

Task = Literal["contrastive", "distillation", "classification", "regression", "tagging", "masked"]
VECTOR_TASKS = ("contrastive", "distillation")
"""Tasks of one model without a head; others stand alone, because each has a head of its own."""


class SourceSettings(Settings):
    """Examples of one task. Every step is of one source."""

    path: str
    """File, folder, glob or s3:// prefix of Parquet or JSON Lines; the task says which columns."""
    task: Task
    """contrastive (query, positive, negatives), distillation (text, vector), classification and regression (text,
    label), tagging (tokens, tags), masked (text)."""
    share: float | None = Field(default=None, gt=0)
    """How often steps are of this source, against the shares of others; by default as often as it has examples."""


class StartSettings(Settings):
    """What is trained further."""

    start: str
    """Model folder (s3:// too) or hub id."""
    pooling: Literal["mean", "cls", "last", "weighted_mean"] | None = None
    """How token vectors become one; by default what the folder says. Classifiers take mean or cls."""
    normalize: bool = True
    """Whether the vectors of the model that is written have unit length."""
    prompts: dict[str, str] | None = None
    """Prompts by name, for the model that is written; `query` and `document` stand before what is trained on. By
    default the folder's."""
    max_tokens: int | None = Field(default=None, gt=3)
    """Longest text, special tokens included; by default the model's."""
    freeze_embedding: bool = False
    """Leave the token embedding as it is."""
    freeze_layers: int = Field(default=0, ge=0)
    """Leave so many layers, from the first, as they are; the embedding too, if there are any."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """What the learning rate is multiplied by for every layer further down."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights that are written."""
    labels: Names = ()
    """Names of labels or tags in their order; by default those of the model's head, else those that occur."""


class ContrastiveSettings(Settings):
    """InfoNCE: every query against all positives and negatives of the global batch."""

    temperature: float = Field(default=0.05, gt=0)
    """What cosines are divided by; where it is learnt, at the start."""
    learn_temperature: bool = False
    """Whether it is learnt."""
    margin: float | None = None
    """A text nearer to a query than its positive by more than this is taken for an answer and left out; none: keep."""
    symmetric: bool = False
    """Whether positives have to find their queries too."""


class DistillationSettings(Settings):
    """A teacher's stored vectors."""

    distance: Literal["cosine", "mse"] = "cosine"
    """How far a vector is from the teacher's."""
    distance_weight: float = Field(default=1.0, ge=0)
    """Of the distance in the loss."""
    neighbour_weight: float = Field(default=0.0, ge=0)
    """Of the ranking: the other texts of the batch should come in the teacher's order."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the softmax over similarities; a low one puts the weight on near neighbours."""
    rotate: bool = False
    """Take a wider teacher: its space is rotated so that the leading dimensions hold most of it, and cut."""
    joined_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the texts that are read in long sequences together, each pooled by itself: so that a chunk's vector
    stands for the chunk whatever surrounds it."""
    joined_tokens: int = Field(default=3072, gt=8)
    """Longest of these sequences."""


class MaskedSettings(Settings):
    """Masked tokens, as in pretraining."""

    rate: float = Field(default=0.3, gt=0, le=1)
    """Share of the tokens to predict."""


class MatryoshkaSettings(Settings):
    """Leading parts of a vector that serve as vectors."""

    dims: Annotated[tuple[int, ...], BeforeValidator(as_names)] = ()
    """Their lengths; the whole is always among them."""
    weights: Annotated[tuple[float, ...], BeforeValidator(as_names)] = ()
    """Of each in the loss; by default 1."""


class ScheduleSettings(Settings):
    """How long, how much at once, how fast."""

    epochs: float | None = Field(default=None, gt=0)
    """How often the examples of all sources together are gone through; by default 1, unless `steps` is given."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, instead of `epochs`."""
    examples_per_step: int = Field(default=64, gt=1)
    """Examples of an optimizer step, over all workers: what in-batch negatives come from."""
    tokens_per_bin: int = Field(default=8192, gt=3)
    """Tokens that go through the model at once."""
    grad_cache: bool = True
    """Keep the graph of one bin only, at the price of a second forward pass; with several workers always."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The highest rate."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the rate rises, at the beginning."""
    decay: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps over which it falls as 1 - sqrt, at the end."""
    weight_decay: float = Field(default=1e-5, ge=0, lt=1)
    """Share of the weights that a step at the highest rate takes off."""
    average_every: int = Field(default=0, ge=0)
    """Steps between weights that enter an average while the rate falls; 0 for no average. It is kept where it is better
    on held-out examples."""


class FinetuneConfiguration(RunSettings):
    """Everything that `nightloom finetune` can be told."""

    heldout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the examples that is never trained on, by a hash of their first text; evaluated on."""
    model: StartSettings
    data: dict[str, SourceSettings] = Field(min_length=1)
    contrastive: ContrastiveSettings = ContrastiveSettings()
    distillation: DistillationSettings = DistillationSettings()
    masked: MaskedSettings = MaskedSettings()
    matryoshka: MatryoshkaSettings = MatryoshkaSettings()
    schedule: ScheduleSettings = ScheduleSettings()

    @property
    def tasks(self) -> tuple[str, ...]:
        """One for each source."""
        return tuple(source.task for source in self.data.values())

    @property
    def is_of_vectors(self) -> bool:
        return self.tasks[0] in VECTOR_TASKS


def check_settings(configuration: FinetuneConfiguration, folder: ModelFolder) -> None:
    """See that the settings go together, and with the model.

    Raises:
        InputError: they do not.
    """
    tasks, work, schedule, start = configuration.tasks, configuration.work, configuration.schedule, configuration.model
    if len(set(tasks)) > 1 and not all(task in VECTOR_TASKS for task in tasks):
        raise InputError(
            f"data: {tasks[0]} and {next(t for t in tasks if t != tasks[0])} cannot be trained together; only "
            "contrastive and distillation go without a head"
        )
    if not configuration.is_of_vectors and len(tasks) > 1:
        raise InputError(f"data: {tasks[0]} takes one source; put its files into one folder")
    if work.min_workers is not None and work.min_workers > work.workers:
        raise InputError(f"work.min_workers {work.min_workers} is more than work.workers {work.workers}")
    if work.strategy == "fsdp":
        raise InputError("work.strategy is fsdp, and fine-tuning has whole weights on each worker; use ddp")
    if schedule.epochs is not None and schedule.steps is not None:
        raise InputError("schedule.epochs and schedule.steps are both given; take one away (schedule.epochs=none)")
    if schedule.warmup + schedule.decay > 1:
        raise InputError(
            f"schedule.warmup {schedule.warmup} and schedule.decay {schedule.decay} are more than 1 together"
        )
    if start.freeze_layers > folder.config.num_layers:
        raise InputError(
            f"model.freeze_layers is {start.freeze_layers}; the model has {folder.config.num_layers} layers"
        )
    if configuration.tasks[0] in ("classification", "regression") and start.pooling in ("last", "weighted_mean"):
        raise InputError(f"model.pooling is {start.pooling}; a classifier of sequences takes mean or cls")
    distillation, matryoshka = configuration.distillation, configuration.matryoshka
    if "distillation" in tasks and not distillation.distance_weight + distillation.neighbour_weight:
        raise InputError("distillation.distance_weight and neighbour_weight are both 0; nothing would be learned")
    if matryoshka.weights and len(matryoshka.weights) != len(matryoshka.dims):
        raise InputError(f"matryoshka: {len(matryoshka.dims)} dims have {len(matryoshka.weights)} weights")
    if wrong := [dim for dim in matryoshka.dims if not 0 < dim <= folder.width]:
        raise InputError(f"matryoshka.dims has {wrong[0]}; the model's vectors have {folder.width} dimensions")


def dims_of(configuration: FinetuneConfiguration, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Matryoshka dimensions and their weights, the whole among them."""
    dims, weights = configuration.matryoshka.dims, configuration.matryoshka.weights
    weights = weights or (1.0,) * len(dims)
    return (dims, weights) if width in dims else ((*dims, width), (*weights, 1.0))


def prompts_of(configuration: FinetuneConfiguration, folder: ModelFolder) -> dict[str, str]:
    return folder.prompts if configuration.model.prompts is None else configuration.model.prompts


def prompt_for(prompts: dict[str, str], names: tuple[str, ...]) -> str:
    return next((prompts[name] for name in names if name in prompts), "")


def count_steps(schedule: ScheduleSettings, num_examples: int) -> int:
    """Optimizer steps of a run over so many examples."""
    if schedule.steps is not None:
        return schedule.steps
    return max(1, round((schedule.epochs or 1.0) * num_examples / schedule.examples_per_step))


def phase_of(schedule: ScheduleSettings, num_steps: int, folder: ModelFolder) -> Phase:
    """The one phase of a fine-tuning. What pretraining counts in tokens counts steps here: each is a nominal bin."""
    size = folder.config.max_tokens
    warmup = round(schedule.warmup * num_steps)
    decay = min(round(schedule.decay * num_steps), num_steps - warmup)
    settings = PhaseSettings(
        tokens=num_steps * size,
        max_tokens=size,
        tokens_per_bin=size,
        tokens_per_step=size,
        learning_rate=schedule.learning_rate,
        warmup_tokens=warmup * size,
        decay_tokens=decay * size,
        weight_decay=schedule.weight_decay,
        average_every=schedule.average_every,
    )
    stream = StreamConfig(max_tokens=size, tokens_per_bin=size, tokens_per_step=size)
    trapezoid = Trapezoid(schedule.learning_rate, num_steps * size, warmup * size, decay * size)
    return Phase("finetune", settings, stream, trapezoid, num_steps)
