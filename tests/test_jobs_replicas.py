"""Two processes with uneven bins against one with all of them, in float64; weights whole on each, and split."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from jobs.replicas import Replicas, fill, whole
from model.batch import PackedBatch, pack
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.heads import MaskedLanguageModel
from model.losses import IGNORED, Pretraining
from model.optimizer import StableAdamW, gradient_norm, parameter_groups

Example = tuple[PackedBatch, Tensor, Tensor, Tensor]
STEPS = 3


def make_model() -> Pretraining:
    config = EncoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, initializer_range=0.1
    )
    model = Pretraining(MaskedLanguageModel(Encoder(config)), ordering=True, z_weight=1e-3)
    init_weights(model, config, torch.Generator().manual_seed(0))
    return model.double()


def make_bins() -> list[Example]:
    """Three bins with 8, 40 and 1 masked tokens and 2, 0 and 1 pairs."""
    generator, bins = np.random.default_rng(0), []
    for length, masked, labels in ((30, 8, [0, 1]), (70, 40, [IGNORED, IGNORED]), (5, 1, [1, IGNORED])):
        batch = pack([generator.integers(0, 97, length), generator.integers(0, 97, 9)])
        chosen = np.sort(generator.permutation(batch.num_tokens)[:masked])
        targets = torch.from_numpy(generator.integers(0, 97, masked))
        bins.append((batch, torch.from_numpy(chosen), targets, torch.tensor(labels)))
    return bins


def blank() -> Example:
    nothing = torch.empty(0, dtype=torch.int64)
    return pack([[0]]), nothing, nothing, torch.tensor([IGNORED])


def learn(replicas: Replicas, mine: list[Example]) -> tuple[Pretraining, StableAdamW, float]:
    """Some steps over these bins, the last one not taken; the model with its gradients, and their norm."""
    model = make_model()
    module = replicas.spread(model)
    optimizer = StableAdamW(parameter_groups(model, 0.01), lr=1e-2)
    masked, pairs = replicas.sum([sum(len(b[1]) for b in mine), sum(int((b[3] != IGNORED).sum()) for b in mine)])
    for step in range(STEPS):
        optimizer.zero_grad()
        for number, item in enumerate(mine):
            with replicas.accumulating(module, last=number == len(mine) - 1):
                factor = replicas.loss_factor
                module(*item, factor / masked, 0.5 * factor / pairs)[0].backward()
        if step < STEPS - 1:
            optimizer.step()
    return model, optimizer, gradient_norm(model)


def be_one_of_two(rank: int, folder: str, strategy: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{strategy}", rank=rank, world_size=2)
    try:
        bins = make_bins()
        replicas = Replicas(rank, 2, strategy=strategy)
        model, optimizer, norm = learn(replicas, bins[:2] if rank == 0 else [bins[2], blank()])
        alone, its_optimizer, its_norm = learn(Replicas(), bins)
        assert math.isclose(norm, its_norm, rel_tol=1e-10)
        theirs = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            other = theirs[name]
            assert parameter.grad is not None
            torch.testing.assert_close(whole(parameter.grad), other.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(whole(parameter.detach()), other.detach(), rtol=1e-10, atol=1e-10)
            for mine, its in zip(optimizer.moments(parameter), its_optimizer.moments(other), strict=True):
                torch.testing.assert_close(whole(mine), its, rtol=1e-10, atol=1e-10)
        with torch.no_grad(), replicas.gathered(model):
            _, sums = model(*bins[0])
        torch.testing.assert_close(sums, alone(*bins[0])[1], rtol=1e-10, atol=1e-10)
        # A whole tensor, cut to size where weights are split, and put together again.
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            fill(parameter, value)
            assert torch.equal(whole(parameter.detach()), value)
        assert replicas.gather(f"rank {rank}") == ["rank 0", "rank 1"]
        # Forty bits of many hashes add up exactly.
        assert replicas.sum([float((1 << 40) - 1), 0.5]) == [float((1 << 41) - 2), 1.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_uneven_workers_learn_what_one_learns(strategy: str, tmp_path: Path) -> None:
    mp.spawn(be_one_of_two, (str(tmp_path), strategy), nprocs=2)


def test_one_is_the_case_without_a_group() -> None:
    replicas = Replicas()
    model = make_model()
    assert replicas.spread(model) is model
    assert replicas.sum([1, 2.5]) == [1.0, 2.5]
    assert replicas.gather("x") == ["x"]
    replicas.wait()
