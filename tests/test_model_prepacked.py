"""Weights laid out for a CPU's products: the same numbers bit for bit, the same state; nothing where they cannot be."""

import copy
import pickle
from collections.abc import Callable
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


@pytest.fixture
def both() -> tuple[Encoder, Encoder]:
    """An encoder as it is, and the same laid out."""
    plain, packed = half_encoder(), half_encoder()
    if not prepack(packed, 256):
        pytest.skip("no bfloat16 products in oneDNN on this processor")
    return plain, packed


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


def test_an_encoder_says_the_same(both: tuple[Encoder, Encoder]) -> None:
    plain, packed = both
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
    for name, broken in (("gives_the_same", lambda packed, linear: False), ("lay_out", lambda weight, tokens: None)):
        with monkeypatch.context() as patch:
            patch.setattr(f"model.prepacked.{name}", broken)
            encoder = half_encoder()
            assert not prepack(encoder, 64)
            assert not any(isinstance(module, PrepackedLinear) for module in encoder.modules())


def assert_same(packed: Encoder, plain: Encoder, *, laid_out: bool) -> None:
    batch = pack([torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (1, 70)])
    first = packed.layers[0].attn.Wqkv
    assert isinstance(first, PrepackedLinear)
    assert (first.packed is not None) == laid_out
    with torch.inference_mode():
        assert torch.equal(packed(batch), plain(batch))


def pickled(encoder: Encoder) -> Encoder:
    return pickle.loads(pickle.dumps(encoder))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_laid_out_where_it_is_made(
    both: tuple[Encoder, Encoder], copied: Callable[[Encoder], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays dense on a machine without these products."""
    plain, packed = both
    assert_same(copied(packed), plain, laid_out=True)
    monkeypatch.setattr("model.prepacked.lay_out", lambda weight, tokens: None)
    dense = copied(packed)
    assert_same(dense, plain, laid_out=False)
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    monkeypatch.undo()
    assert_same(copied(dense), plain, laid_out=True)


def test_an_embedder_can_be_sent_to_another_process() -> None:
    embedder = Embedder(SMALL, device="cpu", dtype="bfloat16")
    texts = ["a text", "another one"]
    assert (pickle.loads(pickle.dumps(embedder)).encode(texts) == embedder.encode(texts)).all()


def test_weights_load_into_what_is_laid_out(both: tuple[Encoder, Encoder]) -> None:
    plain, packed = both
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 1.5
    state = plain.state_dict()
    packed.load_state_dict(state)
    assert_same(packed, plain, laid_out=True)
    weight = state.pop("layers.1.mlp.Wi.weight")
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*layers\.1\.mlp\.Wi\.weight.*Unexpected.*layers\.1\.mlp\.Wi\.more"
    ):
        packed.load_state_dict(state | {"layers.1.mlp.Wi.more": weight})
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.1\.mlp\.Wi\.weight"):
        packed.load_state_dict(state | {"layers.1.mlp.Wi.weight": weight[:3]})


def test_what_is_cast_or_moved_goes_through_dense_weights(both: tuple[Encoder, Encoder]) -> None:
    plain, packed = both
    assert_same(packed.float(), plain.float(), laid_out=False)
    assert packed.layers[0].attn.Wo.weight.dtype == torch.float32
    assert packed.to("meta").layers[0].attn.Wo.weight.device.type == "meta"


def test_other_weights_are_noticed() -> None:
    if not packs():
        pytest.skip("no bfloat16 products in oneDNN on this processor")
    one, other = (Linear(64, 64, bias=False).bfloat16().requires_grad_(False) for _ in range(2))
    assert gives_the_same(PrepackedLinear(one, 64), one)
    assert not gives_the_same(PrepackedLinear(one, 64), other)
