"""What a fine-tuning learns from a batch, behind the seam of jobs/objective.py: vectors, labels, or masked tokens.

Losses are means over the examples of the global batch (its tagged or masked tokens), wherever its bins went.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.phases import Phase
from jobs.replicas import Replicas
from jobs.state import State, write_model
from jobs.tuning import FinetuneConfiguration, dims_of, prompts_of
from model.batch import PackedBatch
from model.contrastive import NEGATIVE, POSITIVE, QUERY, Texts, contrastive_loss
from model.decoder import CausalLanguageModel
from model.distillation import distillation_loss
from model.flops import cost
from model.folder import ModelFolder
from model.gradcache import Loss, VectorBin, VectorModel, learn_from_vectors
from model.heads import Headed
from model.losses import IGNORED, Pretraining
from model.optimizer import gradient_norm
from model.supervised import Supervised
from model.weights import save_folder
from pipeline.example_stream import ExampleBatch, ExampleStream, TextBin
from pipeline.examples import Examples
from pipeline.masking import HELD_OUT, Masker
from pipeline.stream import StreamState

BLANK = TextBin(
    tokens_T=np.zeros(1, np.int64),
    cu_seqlens=np.array([0, 1], np.int32),
    starts_R=np.empty(0, np.int64),
    ends_R=np.empty(0, np.int64),
    texts_R=np.empty(0, np.int64),
    tags_T=np.full(1, IGNORED, np.int64),
    name="blank",
)
"""What a worker with fewer bins than others takes part with; nothing in it is to be learned."""


@dataclass(frozen=True)
class Tuning(ABC):
    """What all of them have in common. A subclass says what a batch counts, what is learned of it, and what is saved.

    What is added up over workers is always a loss, a score (correct ones, or cosines) and what they are means over.
    """

    configuration: FinetuneConfiguration
    folder: ModelFolder
    """What is trained further."""
    sources: Sequence[Examples]
    stream: ExampleStream

    def steps(self, phase: Phase, start: StreamState, replicas: Replicas) -> Generator[ExampleBatch, None, None]:
        return self.stream.steps(start, rank=replicas.rank, num_workers=replicas.size)

    def held_out(self, phase: Phase, replicas: Replicas) -> list[ExampleBatch]:
        most = self.configuration.keep.evaluation_bins
        return self.stream.evaluation(rank=replicas.rank, num_workers=replicas.size, max_bins=most)

    def counts(self, step: ExampleBatch) -> list[float]:
        """What the loss is a mean over, for each source: 0 for those that the step is not of."""
        counts = [0.0] * len(self.sources)
        counts[step.source] = float(self.count(step))
        return counts

    def count(self, step: ExampleBatch) -> int:
        """Examples whose first text is in this worker's share."""
        return sum(int((step.place_N[item.texts_R] == 0).sum()) for item in step.bins)

    def flops(self, state: State, step: ExampleBatch) -> int:
        """What is computed twice counts once."""
        config = state.encoder.config
        return sum(cost(config, np.diff(item.cu_seqlens).tolist(), mode="training").flops for item in step.bins)

    def line(self, counts: Sequence[float], sums: Sequence[float]) -> tuple[float, dict[str, Any]]:
        loss, score = (value / max(sum(counts), 1.0) for value in sums)
        source = int(np.argmax(counts))
        values = {"loss": loss, "source": list(self.configuration.data)[source]}
        return loss, values | self.scored("", source, score)

    def scored(self, prefix: str, source: int, score: float) -> dict[str, float]:
        """A source's score under its name; numbers have none beside their loss."""
        task = self.configuration.tasks[source]
        if task == "regression":
            return {}
        return {prefix + ("cosine" if task == "distillation" else "accuracy"): score}

    @abstractmethod
    def learn(
        self, state: State, replicas: Replicas, step: ExampleBatch, counts: Sequence[float], factor: float
    ) -> list[float]:
        """Add the gradient of this worker's share of a step; the sums that `line` reads."""

    @abstractmethod
    def judge(self, state: State, replicas: Replicas, step: ExampleBatch) -> list[float]:
        """Loss and score of this worker's share of held-out examples."""

    def alone(self, state: State, replicas: Replicas, item: TextBin | None) -> float:
        """By the encoder alone: NaN where its vectors, or a gradient through them, are no numbers."""
        with replicas.accumulating(state.module, last=False):
            loss = state.encoder(packed(item or BLANK, replicas)).square().mean()
            loss.backward()
        return float(loss.detach()) if math.isfinite(gradient_norm(state.model)) else math.nan

    @torch.no_grad()
    def evaluate(self, state: State, replicas: Replicas, held_out: Sequence[ExampleBatch]) -> dict[str, float]:
        values: dict[str, float] = {}
        totals = np.zeros((len(self.sources), 3))
        for step in held_out:
            totals[step.source] += replicas.sum([*self.judge(state, replicas, step), self.count(step)])
        for number, (name, (loss, score, count)) in enumerate(zip(self.configuration.data, totals, strict=True)):
            if count:
                # The first source is what is looked at; others beside it, under their names.
                found = {"heldout_loss": loss / count} | self.scored("heldout_", number, score / count)
                values |= {key if number == 0 else f"{key}_{name}": value for key, value in found.items()}
        return values

    def facts(self) -> dict[str, Any]:
        return facts_of(self.configuration, self.sources)

    def save(self, state: State, output: str, *, first: bool) -> None:
        if first:
            write_model(output, state.step, partial(self.write, state))

    @abstractmethod
    def write(self, state: State, path: str | Path) -> Path:
        """Write the model folder."""


def facts_of(configuration: FinetuneConfiguration, sources: Sequence[Examples]) -> dict[str, Any]:
    """What a run that goes on must find as it was."""
    schedule, tasks = configuration.schedule, configuration.tasks
    return {
        "the task": ", ".join(tasks),
        # It is a parameter, with moments.
        "contrastive.learn_temperature": configuration.contrastive.learn_temperature and "contrastive" in tasks,
        "examples": [examples.fingerprint() for examples in sources],
        "shares": [source.share for source in configuration.data.values()],
        "schedule.examples_per_step": schedule.examples_per_step,
        "schedule.tokens_per_bin": schedule.tokens_per_bin,
        "heldout": configuration.heldout,
        "frozen layers": [configuration.model.freeze_embedding, configuration.model.freeze_layers],
    }


@dataclass(frozen=True)
class VectorTuning(Tuning):
    """Vectors: contrastive pairs, a teacher's vectors, or both by turns. The model is a `VectorModel`."""

    targets: Sequence[np.ndarray]
    """The teacher's vectors for each source, of the student's width."""

    def learn(
        self, state: State, replicas: Replicas, step: ExampleBatch, counts: Sequence[float], factor: float
    ) -> list[float]:
        assert isinstance(state.model, VectorModel)
        loss, score = learn_from_vectors(
            state.model,
            state.module,
            [vector_bin(item, replicas) for item in share(step)],
            len(step.example_N),
            self.loss(step, replicas),
            factor=factor / len(step.examples_B),
            cached=self.configuration.schedule.grad_cache or replicas.size > 1,
            add_up=replicas.add_up,
            accumulating=lambda last: replicas.accumulating(state.module, last=last),
        )
        return [float(loss), float(score)]

    def judge(self, state: State, replicas: Replicas, step: ExampleBatch) -> list[float]:
        assert isinstance(state.model, VectorModel)
        dtype = state.model.log_scale.dtype
        vectors_ND = torch.zeros(len(step.example_N), state.model.width, dtype=dtype, device=replicas.device)
        for item in step.bins:
            some = vector_bin(item, replicas)
            vectors_ND[some.texts_R] = state.model(some.batch, some.starts_R, some.ends_R)
        replicas.add_up(vectors_ND)
        loss, score = self.loss(step, replicas)(vectors_ND, state.model.scale())
        return [float(loss), float(score)]

    def loss(self, step: ExampleBatch, replicas: Replicas) -> Loss:
        """The loss of the task that this batch's source is for."""
        mine = (replicas.rank, replicas.size)
        dims, weights = dims_of(self.configuration, self.folder.width)
        if self.configuration.tasks[step.source] == "contrastive":
            contrastive = self.configuration.contrastive
            roles = np.select([step.place_N == 0, step.place_N == 1], [QUERY, POSITIVE], NEGATIVE)
            told = (step.example_N, roles, step.key_N, step.text_N)
            texts = Texts(*(on_device(array, replicas) for array in told))
            return partial(
                contrastive_loss,
                texts=texts,
                dims=dims,
                weights=weights,
                margin=contrastive.margin,
                symmetric=contrastive.symmetric,
                share=mine,
            )
        distillation = self.configuration.distillation
        learn = partial(
            distillation_loss,
            teacher_NE=on_device(self.targets[step.source][step.examples_B], replicas),
            distance=distillation.distance,
            distance_weight=distillation.distance_weight,
            neighbour_weight=distillation.neighbour_weight,
            temperature=distillation.temperature,
            dims=dims,
            share=mine,
        )
        return lambda vectors, scale: learn(vectors)

    def write(self, state: State, path: str | Path) -> Path:
        assert isinstance(state.model, VectorModel)
        start, prompts = self.configuration.model, prompts_of(self.configuration, self.folder)
        default = self.folder.default_prompt_name
        told = {
            "pooling": start.pooling or self.folder.pooling,
            "dense": list(state.model.dense),
            "normalize": start.normalize,
            "prompts": prompts,
            "default_prompt_name": default if default in prompts else None,
            "max_tokens": start.max_tokens or self.folder.max_tokens,
            "truncate_dim": None,  # what follows from the dimensions that were trained
        }
        return save_folder(
            state.encoder,
            path,
            tokenizer_from=self.folder.path,
            **self.folder.sentence_options() | told,
            dtype=getattr(torch, start.save_dtype),
        )


class BinTuning(Tuning):
    """What is learned of each bin by itself; the model gives a loss for one."""

    def write_headed(self, model: Headed | CausalLanguageModel, path: str | Path) -> Path:
        """The folder of a model with its head, whose texts are cut where those of the model before were."""
        return save_folder(
            model,
            path,
            tokenizer_from=self.folder.path,
            max_tokens=self.folder.max_tokens,
            dtype=getattr(torch, self.configuration.model.save_dtype),
        )

    def learn(
        self, state: State, replicas: Replicas, step: ExampleBatch, counts: Sequence[float], factor: float
    ) -> list[float]:
        """Pass by pass over the bins; each brings its part of the loss."""
        bins = share(step)
        sums = np.zeros(2)
        for number, item in enumerate(bins):
            with replicas.accumulating(state.module, last=number == len(bins) - 1):
                loss, parts = state.module(*self.inputs(step, item, replicas), factor / max(sum(counts), 1.0))
                loss.backward()
            sums += self.reported(parts)
        return sums.tolist()

    def judge(self, state: State, replicas: Replicas, step: ExampleBatch) -> list[float]:
        sums = np.zeros(2)
        for item in step.bins:
            sums += self.reported(state.model(*self.inputs(step, item, replicas))[1])
        return sums.tolist()

    @abstractmethod
    def inputs(self, step: ExampleBatch, item: TextBin, replicas: Replicas) -> tuple[Any, ...]:
        """What the model takes of a bin."""

    def reported(self, parts: Tensor) -> np.ndarray:
        """Loss and score out of what the model reports."""
        return parts[:2].double().cpu().numpy()


class LabelTuning(BinTuning):
    """Labels of texts, numbers of texts, or tags of words. The model is `Supervised`."""

    @property
    def is_tagging(self) -> bool:
        return self.configuration.tasks[0] == "tagging"

    def count(self, step: ExampleBatch) -> int:
        if not self.is_tagging:
            return super().count(step)
        return sum(int((item.tags_T != IGNORED).sum()) for item in step.bins)

    def inputs(self, step: ExampleBatch, item: TextBin, replicas: Replicas) -> tuple[Any, ...]:
        if self.is_tagging:
            rows = np.flatnonzero(item.tags_T != IGNORED)
            targets = item.tags_T[rows]
        else:
            rows = np.arange(len(item.texts_R))
            targets = self.sources[0].targets[step.examples_B[item.texts_R]]
        return packed(item, replicas), on_device(rows, replicas), on_device(targets, replicas)

    def write(self, state: State, path: str | Path) -> Path:
        assert isinstance(state.model, Supervised)
        return self.write_headed(state.model.model, path)


@dataclass(frozen=True)
class MaskedTuning(BinTuning):
    """Masked tokens, on texts of one's own. The model is `Pretraining`."""

    masker: Masker

    def count(self, step: ExampleBatch) -> int:
        return sum(len(self.hide(step, item)[1]) for item in step.bins)

    def inputs(self, step: ExampleBatch, item: TextBin, replicas: Replicas) -> tuple[Any, ...]:
        seen_T, chosen_M = self.hide(step, item)
        clear = packed(item, replicas)
        batch = PackedBatch(on_device(seen_T, replicas), clear.cu_seqlens, clear.max_seqlen, clear.offsets)
        ordering = np.full(len(item.cu_seqlens) - 1, IGNORED, np.int64)
        return batch, *(on_device(array, replicas) for array in (chosen_M, item.tokens_T[chosen_M], ordering))

    def hide(self, step: ExampleBatch, item: TextBin) -> tuple[np.ndarray, np.ndarray]:
        """The tokens as the model is to see them, and which it has to guess: a function of example, epoch and place."""
        positions_T = np.concatenate([np.arange(-1, length - 1) for length in np.diff(item.cu_seqlens)])
        positions_T[item.cu_seqlens[1:] - 1] = -1
        keys = self.sources[0].key_N[step.examples_B[item.texts_R]] if len(item.texts_R) else np.zeros(1)
        epoch = HELD_OUT if step.epoch < 0 else step.epoch
        rate = self.configuration.masked.rate
        return self.masker(item.tokens_T, keys.astype(np.uint64), item.cu_seqlens, positions_T, epoch=epoch, rate=rate)

    def reported(self, parts: Tensor) -> np.ndarray:
        names = Pretraining.SUMS
        return parts[[names.index("loss"), names.index("correct")]].double().cpu().numpy()

    def write(self, state: State, path: str | Path) -> Path:
        assert isinstance(state.model, Pretraining)
        return self.write_headed(state.model.language_model, path)


def share(step: ExampleBatch) -> list[TextBin]:
    """This worker's bins, with blank ones up to the number that every worker goes through."""
    return [*step.bins, *[BLANK] * (step.max_bins - len(step.bins))]


def packed(item: TextBin, replicas: Replicas) -> PackedBatch:
    tokens, offsets = (on_device(array, replicas) for array in (item.tokens_T, item.cu_seqlens))
    return PackedBatch(tokens, offsets, item.max_seqlen, tuple(item.cu_seqlens.tolist()))


def vector_bin(item: TextBin, replicas: Replicas) -> VectorBin:
    arrays = (item.starts_R, item.ends_R, item.texts_R)
    return VectorBin(packed(item, replicas), *(on_device(array, replicas) for array in arrays))


def on_device(array: np.ndarray, replicas: Replicas) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(replicas.device, non_blocking=True)
