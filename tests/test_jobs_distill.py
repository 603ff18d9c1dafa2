"""Distillation: batches that follow from (seed, step), a student that learns, a run that can be cut in two."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.distill import DistillConfiguration, Passages, batches, distill, loss_of, rate_at
from model import Embedder
from model.errors import InputError
from model.folder import load_tokenizer

TEACHER_DIM = 48


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> DistillConfiguration:
    """A teacher that can be learned: the vector of a text is a fixed random projection of its bag of words."""
    folder = tmp_path_factory.mktemp("distill")
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "night", "cluster", "vector", "window", "crash", "token", "lazy", "quick"]
    projection = rng.normal(size=(len(words), TEACHER_DIM))
    picks = [rng.integers(0, len(words), rng.integers(1, 12)) for _ in range(240)]
    vectors = np.stack([projection[p].sum(0) for p in picks])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [" ".join(words[i] for i in p) for p in picks]
    (folder / "teacher").mkdir()
    for part in range(2):
        rows = slice(part * 120, part * 120 + 120)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].astype(np.float16).ravel()), TEACHER_DIM)
        table = pa.table({"text": texts[rows], "vector": column})
        pq.write_table(table, folder / "teacher" / f"part-{part}.parquet")
    return DistillConfiguration(
        teacher=str(folder / "teacher"),
        tokenizer=str(tiny_tokenizer_folder),
        output=str(folder / "student"),
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_tokens=512,
        steps=30,
        tokens_per_batch=512,
        long_tokens=300,
        learning_rate=1e-2,
        dtype="float32",
        checkpoint_every=10,
    )


@pytest.fixture(scope="module")
def passages(configuration: DistillConfiguration) -> Passages:
    files = sorted(Path(configuration.teacher).glob("*.parquet"))
    return Passages(files, configuration.tokenizer, configuration.hidden_size)


def test_targets_keep_the_dot_products_that_fit(passages: Passages, configuration: DistillConfiguration) -> None:
    assert passages.targets.shape == (240, 32)
    # Ten words span the teacher's space: 32 dimensions hold all of it.
    assert passages.kept == pytest.approx(1.0, abs=1e-3)
    files = sorted(Path(configuration.teacher).glob("*.parquet"))
    teacher = np.concatenate([np.stack(pq.read_table(f)["vector"].to_numpy()) for f in files]).astype(np.float32)
    np.testing.assert_allclose(passages.targets @ passages.targets.T, teacher @ teacher.T, atol=2e-3)


def test_batches_follow_from_seed_and_step(passages: Passages, configuration: DistillConfiguration) -> None:
    whole = batches(passages, configuration, 0)
    steps = [next(whole) for _ in range(8)]
    resumed = next(batches(passages, configuration, 5))
    assert torch.equal(steps[5][0].tokens_T, resumed[0].tokens_T)
    assert all(torch.equal(a, b) for a, b in zip(steps[5][1:], resumed[1:], strict=True))
    other = next(batches(passages, configuration.model_copy(update={"seed": 1}), 0))
    assert not torch.equal(other[3], steps[0][3])


def test_ranges_hold_their_passages(passages: Passages, configuration: DistillConfiguration) -> None:
    """Every range is a passage, whole; an epoch has each once; the last sequence alone may pass the budget."""
    stream = batches(passages, configuration, 0)
    seen: list[int] = []
    while len(seen) < 480:
        batch, starts, ends, indices = next(stream)
        assert batch.num_tokens < configuration.tokens_per_batch + configuration.long_tokens
        boundaries = set(batch.host_offsets())
        for start, end, index in zip(starts.tolist(), ends.tolist(), indices.tolist(), strict=True):
            alone = start in boundaries
            low, high = (start + 1, end - 1) if alone else (start, end)
            assert batch.tokens_T[low:high].tolist() == passages.ids[index].tolist()
        seen += indices.tolist()
    assert sorted(seen[:240]) == list(range(240))
    assert sorted(seen[240:480]) == list(range(240))
    assert seen[:240] != seen[240:480]


def test_loss_is_least_at_the_teacher() -> None:
    teacher = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    best, cosine = loss_of(teacher * 3, teacher)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)
    noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    worse, _ = loss_of(teacher + 0.3 * noise, teacher)
    assert float(best) < float(worse) < float(loss_of(noise, teacher)[0])


def test_rate_is_a_trapezoid(configuration: DistillConfiguration) -> None:
    shape = configuration.model_copy(update={"steps": 100, "warmup": 0.1, "decay": 0.4})
    rates = [rate_at(step, shape) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[59] == 1.0
    assert rates[69] == pytest.approx(1 - 0.25**0.5)
    assert all(a >= b > 0 for a, b in pairwise(rates[59:]))


def test_a_run_cut_in_two_is_the_run(configuration: DistillConfiguration, tmp_path: Path) -> None:
    whole = configuration.model_copy(update={"output": str(tmp_path / "whole")})
    report = distill(whole)
    assert report["cosine"] > 0.5, "it learns"
    cut = configuration.model_copy(update={"output": str(tmp_path / "cut")})
    checkpoint = Path(f"{cut.output}.checkpoint.pt")
    distill(cut)
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 30
    checkpoint.unlink()
    # Stop after 20 steps, as a kill would leave it: a checkpoint and no folder.
    stopped = StopAfter(20)
    with pytest.raises(KeyboardInterrupt):
        distill(cut, on_step=stopped)
    assert torch.load(checkpoint, weights_only=True)["step"] == 20
    distill(cut)
    first, second = (Path(c.output) / "model.safetensors" for c in (whole, cut))
    assert first.read_bytes() == second.read_bytes()
    student = Embedder(whole.output, dtype="float32")
    vectors = student.encode(["fox fox fox", "fox fox", "cluster cluster night"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


class StopAfter:
    """Raises as Ctrl-C would, once a number of steps is done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> None:
        if step == self.steps:
            raise KeyboardInterrupt


def test_no_teacher_is_one_line(configuration: DistillConfiguration, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Parquet file"):
        distill(configuration.model_copy(update={"teacher": str(tmp_path)}))


def test_token_vectors_start_the_embedding(configuration: DistillConfiguration, passages: Passages) -> None:
    from jobs.distill import build

    size = load_tokenizer(configuration.tokenizer).get_vocab_size()
    given = np.random.default_rng(0).normal(size=(size, TEACHER_DIM)).astype(np.float32)
    given[:5] = 0
    file = Path(configuration.output).parent / "tokens.npy"
    np.save(file, given)
    encoder = build(passages, configuration.model_copy(update={"token_vectors": str(file)}))
    plain = build(passages, configuration)
    weight, random = encoder.embeddings.tok_embeddings.weight, plain.embeddings.tok_embeddings.weight
    torch.testing.assert_close(weight[5:].detach(), torch.from_numpy(given[5:] @ passages.rotation))
    assert torch.equal(weight[:5], random[:5])
