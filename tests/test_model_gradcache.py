"""GradCache against the whole batch in float64, alone and with Matryoshka, and on two workers against one."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from jobs.replicas import Replicas
from model.batch import pack
from model.config import EncoderConfig
from model.contrastive import NEGATIVE, POSITIVE, QUERY, Texts, contrastive_loss
from model.distillation import distillation_loss
from model.encoder import Encoder, init_weights
from model.gradcache import Loss, VectorBin, VectorModel, learn_from_vectors

TOLERANCE = 1e-9
EXAMPLES = 5
TEXTS = Texts(
    example_N=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0, 3]),
    role_N=torch.tensor([QUERY] * 5 + [POSITIVE] * 5 + [NEGATIVE] * 3),
    key_N=torch.tensor([0, 1, 2, 3, 2, 10, 11, 12, 10, 14, 15, 11, 16]),
    text_N=torch.arange(13),
)
"""Examples 0 and 3 have one document as positive, 2 and 4 one question, and a negative of 0 is the positive of 1."""
TEACHER = torch.randn(13, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "plain": lambda v, s: contrastive_loss(v, s, TEXTS),
    "matryoshka": lambda v, s: contrastive_loss(
        v, s, TEXTS, dims=(8, 16, 32), weights=(1, 2, 4), margin=0.05, symmetric=True
    ),
    "distillation": lambda v, s: distillation_loss(v, TEACHER, neighbour_weight=0.5, dims=(8, 32)),
}


def make_model(*, learn_temperature: bool = True) -> VectorModel:
    config = EncoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, initializer_range=0.2
    )
    encoder = Encoder(config)
    init_weights(encoder, config, torch.Generator().manual_seed(0))
    return VectorModel(encoder, temperature=0.2, learn_temperature=learn_temperature).double()


def make_bins(*groups: list[int]) -> list[VectorBin]:
    """The thirteen texts, of uneven lengths, so many to a bin."""
    lengths = np.random.default_rng(0).integers(1, 90, 13)
    sequences = [np.random.default_rng(i).integers(0, 97, length) for i, length in enumerate(lengths)]
    bins = []
    for group in groups:
        batch = pack([sequences[i] for i in group])
        offsets = batch.cu_seqlens.long()
        bins.append(VectorBin(batch, offsets[:-1], offsets[1:], torch.tensor(group)))
    return bins


def blank() -> VectorBin:
    nothing = torch.empty(0, dtype=torch.int64)
    return VectorBin(pack([[0]]), nothing, nothing, nothing)


def gradients(model: VectorModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_batch(loss: Loss) -> tuple[float, dict[str, Tensor]]:
    """Plain autograd, with nothing of ours between the vectors and the loss."""
    model = make_model()
    (item,) = make_bins(list(range(13)))
    value, _ = loss(model(item.batch, item.starts_R, item.ends_R), model.scale())
    value.backward()
    return float(value.detach()), gradients(model)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_bins_have_the_gradient_of_the_whole_batch(name: str, cached: bool) -> None:
    value, expected = whole_batch(LOSSES[name])
    model = make_model()
    bins = make_bins([12, 3, 0], [1, 2], [4], [5, 6, 7, 8, 9, 10, 11])
    found, _ = learn_from_vectors(model, model, bins, 13, LOSSES[name], cached=cached)
    assert float(found) == pytest.approx(value, abs=TOLERANCE)
    for key, gradient in gradients(model).items():
        other = expected.get(key, torch.zeros_like(gradient))  # of the scale, where a loss has none
        torch.testing.assert_close(gradient, other, rtol=TOLERANCE, atol=TOLERANCE)
    assert set(expected) <= set(gradients(model))


def test_a_factor_scales_the_gradient_alone() -> None:
    first, second = make_model(), make_model()
    bins = make_bins(list(range(8)), list(range(8, 13)))
    value, _ = learn_from_vectors(first, first, bins, 13, LOSSES["plain"])
    same, _ = learn_from_vectors(second, second, bins, 13, LOSSES["plain"], factor=0.25)
    assert value == same
    for key, gradient in gradients(second).items():
        torch.testing.assert_close(gradient, gradients(first)[key] / 4, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_fixed_temperature_learns_nothing() -> None:
    model = make_model(learn_temperature=False)
    learn_from_vectors(model, model, make_bins(list(range(13))), 13, LOSSES["plain"])
    assert model.log_scale.grad is None
    assert float(model.scale()) == pytest.approx(5.0)


def test_the_scale_has_a_limit() -> None:
    model = VectorModel(make_model().encoder, temperature=0.001)
    assert float(model.scale()) == 100.0


def of_share(name: str, share: tuple[int, int]) -> Loss:
    if name == "distillation":
        return lambda v, s: distillation_loss(v, TEACHER, neighbour_weight=0.5, dims=(8, 32), share=share)
    options: dict[str, Any] = {"dims": (8, 16, 32), "weights": (1, 2, 4), "margin": 0.05, "symmetric": True}
    return lambda v, s: contrastive_loss(v, s, TEXTS, share=share, **(options if name == "matryoshka" else {}))


def be_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        for name in ("matryoshka", "distillation"):
            learn_as_one(Replicas(rank, 2), name)
    finally:
        dist.destroy_process_group()


def learn_as_one(replicas: Replicas, name: str) -> None:
    # One has a bin more than the other, which fills up with a blank one.
    mine = make_bins([12, 3, 0], [1, 2, 4]) if replicas.is_first else [*make_bins([5, 6, 7, 8, 9, 10, 11]), blank()]
    model = make_model()
    module = replicas.spread(model)
    value, report = learn_from_vectors(
        model,
        module,
        mine,
        13,
        of_share(name, (replicas.rank, 2)),
        factor=replicas.loss_factor,
        add_up=replicas.add_up,
        accumulating=lambda last: replicas.accumulating(module, last=last),
    )
    expected_value, expected = whole_batch(LOSSES[name])
    total, _ = replicas.sum([float(value), float(report)])
    assert abs(total - expected_value) < TOLERANCE
    for key, gradient in gradients(model).items():
        other = expected.get(key, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_two_workers_have_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(be_one_of_two, (str(tmp_path),), nprocs=2)


def test_pooling_by_position_counts_in_the_sequence() -> None:
    """A text within a sequence is weighted as `Embedder` weights it."""
    model = make_model()
    model.pooling = "weighted_mean"
    batch = pack([[5, 6, 7, 8, 9]])
    hidden = model.encoder(batch)
    (vector,) = model(batch, torch.tensor([2]), torch.tensor([4]))
    torch.testing.assert_close(vector, (hidden[2] * 3 + hidden[3] * 4) / 7)


def test_contexts_see_the_last_pass() -> None:
    seen: list[bool] = []

    def note(last: bool) -> Any:
        seen.append(last)
        return nullcontext()

    learn = partial(learn_from_vectors, accumulating=note)
    model = make_model()
    learn(model, model, make_bins([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]), 13, LOSSES["plain"])
    assert seen[-2:] == [False, True]
    assert not any(seen[:-1])
