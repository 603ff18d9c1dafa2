"""`nightloom finetune`: a model trained further on examples: pairs, a teacher's vectors, labels, tags, masked tokens.

The loop, its workers and its checkpoints are those of pretraining. Everything that can be wrong is found on the driver:
it reads all examples before a worker starts.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import nn

from jobs.checkpoints import Checkpoints
from jobs.group import TrainingReport, member, run_group
from jobs.phases import Phase
from jobs.replicas import Replicas
from jobs.state import State, check_resumable, checkpoint_bytes
from jobs.tasks import LabelTuning, MaskedTuning, Tuning, VectorTuning
from jobs.training import Signals, resume
from jobs.tuning import (
    FinetuneConfiguration,
    check_settings,
    count_steps,
    phase_of,
    prompt_for,
    prompts_of,
)
from model.config import EncoderConfig
from model.dense import load_dense
from model.embedder import choose_dtype
from model.encoder import Encoder
from model.errors import InputError
from model.folder import ModelFolder, check_tokenizer, load_tokenizer, read_folder
from model.gradcache import VectorModel
from model.heads import Headed, MaskedLanguageModel, SequenceClassifier, TokenClassifier
from model.losses import Pretraining
from model.optimizer import LossScale, StableAdamW, parameter_groups
from model.protocols import DOCUMENT_PROMPTS, QUERY_PROMPTS
from model.schedule import SpikeGuard
from model.supervised import Supervised, labelled, put_classifier
from model.weights import load_encoder, load_model
from pipeline.example_stream import ExampleStream, ExampleStreamConfig
from pipeline.examples import Examples, Reading, read_examples
from pipeline.masking import Masker, MaskingConfig
from pipeline.storage import local_model
from pipeline.vocabulary import read_vocabulary

log = logging.getLogger(__name__)

CLASSIFIERS: dict[str, tuple[str, type[SequenceClassifier] | type[TokenClassifier]]] = {
    "classification": ("ModernBertForSequenceClassification", SequenceClassifier),
    "regression": ("ModernBertForSequenceClassification", SequenceClassifier),
    "tagging": ("ModernBertForTokenClassification", TokenClassifier),
}
MASKED, BARE = "ModernBertForMaskedLM", "ModernBertModel"


def run_finetune(configuration: FinetuneConfiguration) -> TrainingReport:
    """Train, or go on with training.

    Raises:
        InputError: a model, examples, a checkpoint or settings that do not belong together, or too little disk.
        Diverged, KeyboardInterrupt: as `run_group` does.
    """
    phase, sources = check(configuration)
    return run_group("finetune", work_on, configuration, (phase,), sources=sources)


def check(configuration: FinetuneConfiguration) -> tuple[Phase, list[Examples]]:
    """Everything that can be wrong before a worker starts. Returns what was read for that.

    Raises:
        InputError: it is.
    """
    folder = read_folder(local_model(configuration.model.start))
    check_settings(configuration, folder)
    sources = read_sources(configuration, folder)
    tuning, phase = make_tuning(configuration, folder, sources)
    checkpoints = Checkpoints(configuration.output, configuration.keep.checkpoints)
    if steps := checkpoints.steps():
        shape = shape_of(configuration, folder, sources)
        check_resumable(checkpoints.read_record(steps[-1]), shape, configuration, (phase,), tuning.facts())
    average = configuration.schedule.average_every > 0
    checkpoints.check_space(checkpoint_bytes(folder.config, average=average))
    return phase, sources


def work_on(job: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker runs, from the latest checkpoint to the end."""
    configuration = FinetuneConfiguration.model_validate(job["configuration"])
    replicas, signals = member(job, configuration)
    # Arrays in Ray's object store: read in place, once for each machine.
    return go_on(configuration, ray.get(job["sources"]), replicas, signals, signals.post)


def go_on(
    configuration: FinetuneConfiguration,
    sources: Sequence[Examples],
    replicas: Replicas,
    signals: Signals,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train from the latest checkpoint of a run, or from its beginning; with Ray or without. Returns as `resume`."""
    folder = read_folder(local_model(configuration.model.start))
    tuning, phase = make_tuning(configuration, folder, sources)
    state = begin(configuration, folder, sources, replicas)
    return resume(configuration, (phase,), tuning, state, replicas, signals, show)


def read_sources(configuration: FinetuneConfiguration, folder: ModelFolder) -> list[Examples]:
    """All examples, tokenized.

    Raises:
        InputError: as `read_examples`, saying which source.
    """
    tokenizer = load_tokenizer(folder.path)
    check_tokenizer(tokenizer, folder.config, folder.path)
    prompts, sources = prompts_of(configuration, folder), []
    for name, source in configuration.data.items():
        reading = Reading(
            task=source.task,
            max_tokens=configuration.model.max_tokens or folder.max_tokens,
            query_prompt=prompt_for(prompts, QUERY_PROMPTS) if configuration.is_of_vectors else "",
            prompt=prompt_for(prompts, DOCUMENT_PROMPTS) if configuration.is_of_vectors else "",
            pool_prompt=folder.include_prompt,
            names=configuration.model.labels or names_of(source.task, folder),
        )
        try:
            sources.append(read_examples(source.path, tokenizer, reading))
        except InputError as error:
            raise InputError(f"data.{name}: {error}") from None
        if sources[-1].truncated:
            log.info("data.%s: %d texts are longer than %d tokens", name, sources[-1].truncated, reading.max_tokens)
    return sources


def names_of(task: str, folder: ModelFolder) -> tuple[str, ...]:
    """The labels that a model has learned already; none where it has another head."""
    if CLASSIFIERS.get(task, ("", None))[0] != folder.architecture or task == "regression":
        return ()
    names = folder.config.extra.get("id2label") or {}
    return tuple(names[str(number)] for number in range(len(names)))


def make_tuning(
    configuration: FinetuneConfiguration, folder: ModelFolder, sources: Sequence[Examples]
) -> tuple[Tuning, Phase]:
    """What is learned, and for how long.

    Raises:
        InputError: a teacher of another dimension, sequences longer than a bin, a model without the head that the task
            goes on with, or a tokenizer without a special token that is needed.
    """
    schedule, config = configuration.schedule, folder.config
    num_steps = count_steps(schedule, sum(examples.num_examples for examples in sources))
    stream = ExampleStream(
        sources,
        ExampleStreamConfig(
            examples_per_step=schedule.examples_per_step,
            tokens_per_bin=schedule.tokens_per_bin,
            num_steps=num_steps,
            seed=configuration.seed,
            heldout=configuration.heldout,
            joined_share=configuration.distillation.joined_share,
            joined_tokens=min(configuration.distillation.joined_tokens, config.max_tokens),
        ),
        shares=shares_of(configuration, sources),
        joined=[task == "distillation" and configuration.distillation.joined_share > 0 for task in configuration.tasks],
        cls_id=config.cls_id or 0,
        sep_id=config.sep_id or 0,
    )
    phase = phase_of(schedule, num_steps, folder)
    if configuration.is_of_vectors:
        targets = teacher_vectors(configuration, folder, sources)
        return VectorTuning(configuration, folder, sources, stream, targets), phase
    if configuration.tasks[0] != "masked":
        return LabelTuning(configuration, folder, sources, stream), phase
    if folder.architecture != MASKED:
        raise InputError(f"{folder.path} has no masked-token head ({folder.architecture}); take a pretrained model")
    vocabulary = read_vocabulary(folder.path)
    masker = Masker(
        MaskingConfig(rate=configuration.masked.rate),
        seed=configuration.seed,
        mask_id=vocabulary.mask_id,
        special_ids=vocabulary.special_ids,
        vocab_size=vocabulary.size,
    )
    return MaskedTuning(configuration, folder, sources, stream, masker), phase


def shares_of(configuration: FinetuneConfiguration, sources: Sequence[Examples]) -> list[float]:
    """How often steps are of each source."""
    given = [source.share for source in configuration.data.values()]
    if all(share is None for share in given):
        return [float(examples.num_examples) for examples in sources]
    if None in given:
        name = list(configuration.data)[given.index(None)]
        raise InputError(f"data.{name} has no share, and others have; give each one, or none")
    return [share for share in given if share is not None]


def teacher_vectors(
    configuration: FinetuneConfiguration, folder: ModelFolder, sources: Sequence[Examples]
) -> list[np.ndarray]:
    """What the vectors of each source are to come near to, of the student's width; for pairs there is nothing.

    Raises:
        InputError: a teacher of another dimension, that is not to be rotated, or narrower.
    """
    width, targets = folder.width, []
    for (name, source), examples in zip(configuration.data.items(), sources, strict=True):
        dim = examples.targets.shape[1] if source.task == "distillation" else width
        if dim != width and (dim < width or not configuration.distillation.rotate):
            advice = "take a narrower model" if dim < width else "distillation.rotate cuts them to size"
            raise InputError(
                f"data.{name}: the teacher's vectors have {dim} dimensions, those of {folder.path} {width}; {advice}"
            )
        targets.append(rotate(examples.targets, width) if dim > width else examples.targets)
    return targets


def rotate(teacher_EF: np.ndarray, dim: int) -> np.ndarray:
    """The teacher's vectors in the `dim` directions that hold most of their energy, the first most of all.

    Uncentred: dot products, not variances, are what must survive the cut.
    """
    _, directions = np.linalg.eigh(teacher_EF.T @ teacher_EF)
    return teacher_EF @ np.ascontiguousarray(directions[:, ::-1][:, :dim])


def shape_of(configuration: FinetuneConfiguration, folder: ModelFolder, sources: Sequence[Examples]) -> EncoderConfig:
    """The shape of what is trained, labels included."""
    if configuration.tasks[0] not in CLASSIFIERS:
        return folder.config
    asked = configuration.model.pooling or (folder.pooling if folder.architecture == BARE else "")
    kinds: dict[str, Literal["cls", "mean"]] = {"cls": "cls", "mean": "mean"}
    return labelled(folder.config, sources[0].names, pooling=kinds.get(asked))


def begin(
    configuration: FinetuneConfiguration, folder: ModelFolder, sources: Sequence[Examples], replicas: Replicas
) -> State:
    """The state before the first step: every worker makes the same.

    Raises:
        InputError: a model that cannot be read or does not fit.
    """
    work, start = configuration.work, configuration.model
    dtype, reason = choose_dtype(work.dtype, replicas.device)
    log.info("computing in %s: %s", str(dtype).removeprefix("torch."), reason)
    options: dict[str, Any] = {"attention": work.attention, "dtype": dtype, "device": replicas.device}
    model, encoder = make_model(configuration, folder, sources, options)
    model.float().to(replicas.device)
    if start.freeze_embedding or start.freeze_layers:
        encoder.embeddings.requires_grad_(False)
    for layer in list(encoder.layers)[: start.freeze_layers]:
        layer.requires_grad_(False)
    encoder.checkpoint_activations = work.checkpoint_activations
    if work.compile:
        for layer in encoder.layers:
            layer.compile(dynamic=True)
    module = replicas.spread(model)
    settings = configuration.optimizer
    optimizer = StableAdamW(
        parameter_groups(model, 0.0, layer_decay=start.layer_decay),
        lr=0.0,
        peak_lr=1.0,
        betas=(settings.beta_1, settings.beta_2),
        eps=settings.eps,
    )
    guard = SpikeGuard(deviations=settings.spike_deviations)
    return State(model, encoder, module, optimizer, LossScale.of(dtype), guard)


def make_model(
    configuration: FinetuneConfiguration, folder: ModelFolder, sources: Sequence[Examples], options: dict[str, Any]
) -> tuple[nn.Module, Encoder]:
    """The model that returns losses, and the encoder in it."""
    task = configuration.tasks[0]
    if configuration.is_of_vectors:
        contrastive = configuration.contrastive
        vectors = VectorModel(
            load_encoder(folder, **options),
            pooling=configuration.model.pooling or folder.pooling,
            dense=load_dense(folder.dense),
            temperature=contrastive.temperature,
            learn_temperature=contrastive.learn_temperature and "contrastive" in configuration.tasks,
        )
        return vectors, vectors.encoder
    if task == "masked":
        language_model = load_model(folder, **options)
        assert isinstance(language_model, MaskedLanguageModel)
        return Pretraining(language_model), language_model.model
    architecture, kind = CLASSIFIERS[task]
    shape = shape_of(configuration, folder, sources)
    if folder.architecture == architecture and folder.config.num_labels == shape.num_labels:
        classifier = load_model(folder, **options)
        assert isinstance(classifier, SequenceClassifier | TokenClassifier)
        classifier.model.config = shape
    else:
        trained = None if folder.architecture == BARE else load_model(folder)
        generator = torch.Generator().manual_seed(configuration.seed)
        classifier = put_classifier(
            kind,
            load_encoder(folder, **options),
            shape,
            generator,
            trained=trained if isinstance(trained, Headed) else None,
        )
    return Supervised(classifier, regression=task == "regression"), classifier.model
