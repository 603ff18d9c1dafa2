"""float16 does not overflow: the bundled model on hostile input, and what makes a probe of ranges see an overflow."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ranges import KINDS, LARGEST, bins, hostile, largest_values, not_finite
from model.config import preset
from model.embedder import Embedder
from model.encoder import Encoder, init_weights

SMALL = Path(__file__).resolve().parent.parent / "models" / "nightloom-small"
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_layers": 4, "num_heads": 2}


def small_encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    config = preset("base", **SHAPE, max_tokens=512, pad_id=0, cls_id=1, sep_id=2)
    encoder = Encoder(config, dtype=dtype)
    init_weights(encoder, config, torch.Generator().manual_seed(0))
    return encoder.eval().requires_grad_(False)


def test_a_few_hostile_sequences_stay_finite_in_float16() -> None:
    encoder = small_encoder(torch.float16)
    assert not_finite(encoder, bins(hostile(60, encoder.config))) == (0, 60)


def test_an_overflow_is_seen_by_both() -> None:
    """Weights that make a product of 100,000: float32 says how large, float16 that it is infinite."""
    exact, half = small_encoder(), small_encoder(torch.float16)
    for encoder in (exact, half):
        encoder.layers[2].mlp.Wi.weight.zero_()[:, :32] = 1_000.0  # half of the inputs: all of them sum to 0
    largest = largest_values(exact, bins(hostile(20, exact.config)))
    assert largest["layers.2.mlp.Wo in"] > LARGEST
    assert max(value for name, value in largest.items() if name.startswith("layers.0")) < 100
    bad, total = not_finite(half, bins(hostile(20, half.config)))
    assert bad > 0
    assert total == 20


def test_hostile_sequences_are_what_they_say() -> None:
    config = small_encoder().config
    made = list(hostile(1_000, config))
    assert len(made) == 1_000
    assert max(map(len, made)) == 512  # one in a thousand has the greatest length
    assert [len(set(made[i].tolist())) for i in (0, 2)] == [1, 1]
    assert len(made[KINDS.index("one")]) == 1
    assert set(made[KINDS.index("special")].tolist()) <= {0, 1, 2}
    assert all(np.array_equal(a, b) for a, b in zip(made, hostile(1_000, config), strict=True))


@pytest.mark.slow
def test_ten_thousand_hostile_sequences_in_float16() -> None:
    embedder = Embedder(SMALL, device="cpu", dtype="float16")
    assert not_finite(embedder.encoder, bins(hostile(10_000, embedder.config))) == (0, 10_000)
