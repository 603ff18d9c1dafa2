"""Weights laid out for a CPU's products: the same numbers bit for bit, the same state; nothing where they cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model_quantized import random_encoder
from torch import nn

from model.batch import pack
from model.embedder import Embedder
from model.encoder import Encoder, Linear
from model.prepacked import PrepackedLinear, gives_the_same, prepack
from model.quantized import quantize

SMALL = Path(__file__).resolve().parent.parent / "models" / "nightloom-small"
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def half_encoder() -> Encoder:
    """As an `Embedder` has it: products in bfloat16."""
    encoder = random_encoder(torch.bfloat16).requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return encoder


def packs() -> bool:
    """Whether this processor has the products at all."""
    return prepack(half_encoder(), 64)


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same_whatever_the_batch(bias: bool) -> None:
    if not packs():
        pytest.skip("no bfloat16 products in oneDNN on this processor")
    torch.manual_seed(0)
    linear = Linear(96, 160, bias=bias).bfloat16().requires_grad_(False)
    packed = PrepackedLinear(linear, 64)
    with torch.inference_mode():
        for tokens in (1, 2, 63, 64, 65, 1000):
            x = torch.randn(tokens, 96).bfloat16()
            assert torch.equal(packed(x), F.linear(x, linear.weight, linear.bias))
    assert packed.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in linear.state_dict().items())


def test_an_encoder_says_the_same() -> None:
    plain, packed = half_encoder(), half_encoder()
    if not prepack(packed, 256):
        pytest.skip("no bfloat16 products in oneDNN on this processor")
    assert isinstance(packed.layers[0].attn.Wqkv, PrepackedLinear)
    batch = pack([torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (1, 70, 300)])
    with torch.inference_mode():
        assert torch.equal(packed(batch), plain(batch))
    before, after = plain.state_dict(), packed.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_embedder_uses_it_where_it_computes_in_bfloat16() -> None:
    for dtype, wanted in (("bfloat16", packs()), ("float32", False)):
        embedder = Embedder(SMALL, device="cpu", dtype=dtype)
        assert isinstance(embedder.encoder.layers[0].mlp.Wi, PrepackedLinear) == wanted
        assert np.isfinite(embedder.encode(["a text", "b " * 900])).all()


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoder in (random_encoder(), quantize(half_encoder())):
        kinds = [type(module) for module in encoder.modules()]
        assert not prepack(encoder, 64)
        assert [type(module) for module in encoder.modules()] == kinds
    # A layout that gives other numbers, and a build without the operator.
    encoder = half_encoder()
    for broken in (lambda packed, linear: False, refuse):
        monkeypatch.setattr("model.prepacked.gives_the_same", broken)
        assert not prepack(encoder, 64)
        assert not any(isinstance(module, PrepackedLinear) for module in encoder.modules())


def refuse(packed: PrepackedLinear, linear: nn.Linear) -> bool:
    raise RuntimeError("no such operator")


def test_other_weights_are_noticed() -> None:
    if not packs():
        pytest.skip("no bfloat16 products in oneDNN on this processor")
    one, other = (Linear(64, 64, bias=False).bfloat16().requires_grad_(False) for _ in range(2))
    assert gives_the_same(PrepackedLinear(one, 64), one)
    assert not gives_the_same(PrepackedLinear(one, 64), other)
