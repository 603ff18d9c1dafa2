"""What the loop asks of a fine-tuning: counts, lines, evaluation, and what a bin does by itself."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from test_jobs_finetune import configuration, write_rows

from jobs.finetune import begin, make_tuning, read_sources
from jobs.phases import Phase
from jobs.replicas import Replicas
from jobs.state import State
from jobs.tasks import BLANK, LabelTuning, MaskedTuning, Tuning, VectorTuning, share
from model.contrastive import NEGATIVE, POSITIVE, QUERY, hidden_pairs
from model.folder import read_folder
from pipeline.example_stream import BEGINNING, ExampleBatch


def make(task: str, model: Path, folder: Path, *sets: str) -> tuple[Tuning, State, Phase]:
    settings = configuration(model, folder / "run", {task: write_rows(folder, task, 60)}, *sets)
    described = read_folder(model)
    sources = read_sources(settings, described)
    tuning, phase = make_tuning(settings, described, sources)
    return tuning, begin(settings, described, sources, Replicas()), phase


ALONE = Replicas()


def first(tuning: Tuning, phase: Phase, replicas: Replicas = ALONE) -> ExampleBatch:
    steps = tuning.steps(phase, BEGINNING, replicas)
    batch = next(steps)
    steps.close()
    return batch


def test_counts_of_workers_add_up_to_the_batch(tiny_model_folder: Path, tmp_path: Path) -> None:
    tuning, _, phase = make("contrastive", tiny_model_folder, tmp_path, "schedule.tokens_per_bin=64")
    shares = [first(tuning, phase, Replicas(rank, 3)) for rank in range(3)]
    assert sum(tuning.counts(batch)[0] for batch in shares) == 16
    assert len({len(share(batch)) for batch in shares}) == 1, "with blank bins all have equally many"
    blank = sum(item is BLANK for batch in shares for item in share(batch))
    assert blank == 3 * shares[0].max_bins - shares[0].num_bins


def test_an_answer_is_none_the_less_one_under_another_id(tiny_model_folder: Path, tmp_path: Path) -> None:
    """And as a negative without an id."""
    rows = [
        {"query": "a fox?", "positive": "The fox.", "positive_id": "1"},
        {"query": "a dog?", "positive": "The dog.", "positive_id": "2", "negatives": ["The fox."]},
        {"query": "an animal?", "positive": "The fox.", "positive_id": "3"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"contrastive": tmp_path / "rows.jsonl"}
    settings = configuration(tiny_model_folder, tmp_path / "run", data, "schedule.examples_per_step=3")
    described = read_folder(tiny_model_folder)
    tuning, phase = make_tuning(settings, described, read_sources(settings, described))
    assert isinstance(tuning, VectorTuning)
    batch = first(tuning, phase)
    loss = tuning.loss(batch, Replicas())
    assert isinstance(loss, partial)
    texts = loss.keywords["texts"]
    queries, documents = texts.of(QUERY), torch.cat([texts.of(POSITIVE), texts.of(NEGATIVE)])
    hidden = hidden_pairs(texts, queries, documents)
    # In the batch's order: for the two that ask for the fox all of its texts are hidden, for the dog its own only.
    dog = int(np.flatnonzero(np.bincount(batch.example_N) == 3)[0])
    assert hidden.sum(dim=1).tolist() == [1 if number == dog else 3 for number in range(3)]


def test_a_line_is_of_the_source_of_its_step(tiny_model_folder: Path, tmp_path: Path) -> None:
    tuning, _, _ = make("distillation", tiny_model_folder, tmp_path)
    total, values = tuning.line([4.0], [2.0, 3.0])
    assert total == values["loss"] == 0.5
    assert (values["cosine"], values["source"]) == (0.75, "distillation")


def test_one_bin_by_itself_tells_whether_it_is_a_number(tiny_model_folder: Path, tmp_path: Path) -> None:
    tuning, state, phase = make("contrastive", tiny_model_folder, tmp_path)
    batch = first(tuning, phase)
    assert math.isfinite(tuning.alone(state, Replicas(), batch.bins[0]))
    with torch.no_grad():
        state.encoder.embeddings.tok_embeddings.weight[int(batch.bins[0].tokens_T[1])] = torch.nan
    state.optimizer.zero_grad()
    assert math.isnan(tuning.alone(state, Replicas(), batch.bins[0]))
    state.optimizer.zero_grad()
    assert math.isfinite(tuning.alone(state, Replicas(), None)), "a blank one is no cause"


def test_masks_follow_from_example_and_epoch(tiny_masked_folder: Path, tmp_path: Path) -> None:
    tuning, _, phase = make("masked", tiny_masked_folder, tmp_path)
    assert isinstance(tuning, MaskedTuning)
    batch = first(tuning, phase)
    item = batch.bins[0]
    seen, chosen = tuning.hide(batch, item)
    again = tuning.hide(batch, item)
    assert np.array_equal(seen, again[0])
    assert 0.1 < len(chosen) / item.num_tokens < 0.5
    ends = np.concatenate([item.cu_seqlens[:-1], item.cu_seqlens[1:] - 1])
    assert not set(chosen.tolist()) & set(ends.tolist()), "special tokens are not guessed"
    assert tuning.counts(batch)[0] == sum(len(tuning.hide(batch, b)[1]) for b in batch.bins)


def test_tags_count_words(tiny_masked_folder: Path, tmp_path: Path) -> None:
    tuning, _, phase = make("tagging", tiny_masked_folder, tmp_path)
    assert isinstance(tuning, LabelTuning)
    batch = first(tuning, phase)
    tagged = int((tuning.sources[0].tags_X >= 0).sum())
    assert 16 <= tuning.counts(batch)[0] < tagged, "each of the sixteen texts has a tagged word"
