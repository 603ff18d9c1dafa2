"""int8 weights: within half a step, exact products, folders that come back the same and that no other library takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import kernels
from model.batch import pack
from model.config import preset
from model.embedder import Embedder
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import read_folder
from model.quantized import HALF_STEP, QuantizedEmbedding, QuantizedLinear, quantize, quantize_weight
from model.weights import load_encoder, load_model, save_folder

SMALL = Path(__file__).resolve().parent.parent / "models" / "nightloom-small"
SHAPE = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 192, "num_layers": 4, "num_heads": 2}


def random_encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    config = preset("base", **SHAPE)
    encoder = Encoder(config, dtype=dtype)
    init_weights(encoder, config, torch.Generator().manual_seed(0))
    return encoder.eval().requires_grad_(False)


def test_weights_are_within_half_a_step_of_their_row() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    quantized, scale = quantize_weight(weight)
    assert quantized.dtype == torch.int8
    assert quantized.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((quantized * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(quantize_weight(-weight)[0], -quantized)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_a_product_is_that_of_the_quantized_operands(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in int8 where the processor has int8 products, weights alone elsewhere: each exact for what it is."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(96, 64, bias=bias)
    layer.weight.data = torch.randint(-127, 128, (64, 96), generator=generator, dtype=torch.int8)
    layer.weight_scale.data = torch.rand(64, generator=generator)
    x = torch.randn(rows, 96, generator=generator)
    offset = layer.bias if bias else torch.zeros(64)
    if bias:
        layer.bias.data = torch.randn(64, generator=generator)
        offset = layer.bias
    exact_weight = layer.weight.double() * layer.weight_scale[:, None].double()
    monkeypatch.setattr(kernels, "multiplies_int8", lambda: True)
    quantized, scale = kernels.quantize_rows(x)
    want = (quantized.double() * scale[:, None].double()) @ exact_weight.T + offset.double()
    assert torch.allclose(layer(x).double(), want, rtol=1e-6, atol=1e-4)
    monkeypatch.setattr(kernels, "multiplies_int8", lambda: False)
    want = x.double() @ exact_weight.T + offset.double()
    assert torch.allclose(layer(x).double(), want, rtol=1e-5, atol=1e-3)


def test_float16_holds_the_sums_of_a_large_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained encoders have channels of some hundreds: 600 times 127 steps is beyond float16, 600 times 0.06 is not."""
    monkeypatch.setattr(kernels, "multiplies_int8", lambda: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.init.trunc_normal_(torch.empty(2304, 768), std=0.02, a=-0.06, b=0.06, generator=generator)
    x = torch.randn(4, 768, generator=generator)
    x[:, 5] += 600
    layer = QuantizedLinear(768, 2304)
    layer.weight.data, layer.weight_scale.data = quantize_weight(weight)
    assert (x @ layer.weight.float().T).abs().max() > torch.finfo(torch.float16).max
    want = x.half().double() @ (layer.weight.double() * layer.weight_scale[:, None].double()).T
    worst = (layer(x.half()).double() - want).abs().max()
    assert worst < 2**-9 * want.abs().max()  # two roundings, of the sum and of the scale
    # The weights went into the product as they are.
    assert torch.equal((layer.weight.half() * HALF_STEP).double() / HALF_STEP, layer.weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_encoder_stays_close(dtype: torch.dtype) -> None:
    batch = pack([torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (1, 70, 300)])
    with torch.no_grad():
        exact = random_encoder()(batch)
        encoder = quantize(random_encoder(dtype))
        for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"):
            assert isinstance(encoder.layers[2].get_submodule(name), QuantizedLinear)
        assert isinstance(encoder.embeddings.tok_embeddings, QuantizedEmbedding)
        cosine = F.cosine_similarity(encoder(batch), exact, dim=-1)
    assert 0.999 < cosine.min() < 0.999999  # quantized indeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in int8."""
    plain = read_folder(SMALL)
    path = tmp_path_factory.mktemp("int8") / "model"
    encoder = quantize(load_encoder(plain))
    return save_folder(encoder, path, tokenizer_from=SMALL, **plain.sentence_options())


def test_a_folder_comes_back_bit_for_bit(folder: Path) -> None:
    before = quantize(load_encoder(read_folder(SMALL))).state_dict()
    after = load_encoder(read_folder(folder)).state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    size = (folder / "model.int8.safetensors").stat().st_size
    assert size < 0.55 * (SMALL / "model.safetensors").stat().st_size  # that one is in float16


def test_an_embedder_reads_it(folder: Path) -> None:
    texts = ["How do I sort a list?", "The kernel maps pages.", "a " * 700]
    exact, ours = (
        Embedder(SMALL, device="cpu", dtype="float32").encode(texts),
        Embedder(folder, device="cpu").encode(texts),
    )
    cosine = (exact * ours).sum(axis=1)
    assert 0.99 < cosine.min() < 0.999999
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_other_libraries_refuse_it_and_we_refuse_theirs(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    config["quantization_config"] = {"quant_method": "gptq"}
    for name in ("model.int8.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="quantized by 'gptq'"):
        read_folder(tmp_path)


def test_a_head_needs_the_float_model(folder: Path) -> None:
    with pytest.raises(InputError, match="int8 weights, which embed and nothing else"):
        load_model(read_folder(folder), "ModernBertForMaskedLM")
