"""The memory planner: its count of a training step against the tensors that autograd really keeps, and whole cards."""

import pytest
import torch

from model import kernels
from model.attention import _to_blocks
from model.batch import pack
from model.config import FULL, preset
from model.encoder import Encoder, init_weights
from model.memory import fitting_tokens, token_bytes, weight_bytes
from model.patterns import Pattern, window_bias

CARDS_GB = (6, 12, 24, 40, 80)
SHAPE = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 192, "num_layers": 6, "num_heads": 2}


def kept_bytes(encoder: Encoder, num_tokens: int) -> int:
    """Bytes behind everything that the backward pass of a batch needs, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or a freed place would be counted for two

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(pack([[7] * num_tokens])).square().mean()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_in_training_takes_what_autograd_keeps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lengths, so that what does not grow with tokens (casts of weights, tables) falls out. With PyTorch's
    operators, as on GPUs: the native kernels of CPUs keep a sixth less.
    """
    monkeypatch.setattr(kernels, "library", lambda: (None, "left out"))
    config = preset("base", **{**SHAPE, "layer_types": (FULL,) * 6})
    encoder = Encoder(config, dtype=dtype, attention="blocks")
    init_weights(encoder, config)
    grown = (kept_bytes(encoder, 1_024) - kept_bytes(encoder, 512)) / 512
    assert grown == pytest.approx(token_bytes(config, "training", dtype.itemsize), rel=0.1)


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_in_inference_takes_its_copies_in_blocks(causal: bool) -> None:
    """What xformers' local layers hold at once, against the count; a window of 64 makes five copies of a key."""
    config, count = preset("base", **SHAPE, causal=causal), 4_096
    batch = pack([[7] * count])
    stream = torch.zeros(count, config.hidden_size)
    qkv = torch.zeros(3, count, config.num_heads, config.head_size, dtype=torch.bfloat16)
    bias = window_bias(batch, Pattern(config.window, causal), torch.bfloat16)
    assert bias is not None
    blocks = [_to_blocks(x, reach, reach).contiguous() for x, reach in zip(qkv, (0, config.window, config.window))]
    normed = attended = qkv[0]
    held = sum(x.nbytes for x in (stream, stream, normed, qkv, *blocks, bias, attended))
    assert held / count == pytest.approx(token_bytes(config, "forward"), rel=0.01)


def test_plans_for_cards_from_6_to_80_gb() -> None:
    for name in ("base", "large"):
        config = preset(name)
        for mode in ("forward", "training", "recompute"):
            tokens = [fitting_tokens(config, gb * 10**9, mode, loaded=False) for gb in CARDS_GB]
            assert tokens == sorted(tokens)
            used = [weight_bytes(config, mode) + count * token_bytes(config, mode) for count in tokens]
            assert all(bytes_ <= gb * 0.8e9 for bytes_, gb in zip(used, CARDS_GB, strict=True) if gb > 6)
    base, large = preset("base"), preset("large")
    assert fitting_tokens(base, 6 * 10**9, loaded=False) > 65_536  # a small card embeds in full batches
    assert fitting_tokens(base, 6 * 10**9, "recompute", loaded=False) > 8_192  # and trains on one long sequence
    assert fitting_tokens(large, 6 * 10**9, "training", loaded=False) == 0  # its optimizer alone takes more
    assert fitting_tokens(base, 80 * 10**9, "training", loaded=False) > 90_000


def test_checkpoints_take_less_and_inference_least() -> None:
    config = preset("base")
    assert token_bytes(config, "forward") < token_bytes(config, "recompute") < token_bytes(config, "training")
    assert token_bytes(config, "forward") < token_bytes(config, "forward", 4)
