"""The encoder against Hugging Face's ModernBertModel with the same random weights, layer by layer, in one packed batch;
and what training needs of it: gradients, mixed precision, recomputation, initialisation.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.batch import PackedBatch, pack
from model.config import FULL, SLIDING, EncoderConfig, preset
from model.encoder import Encoder, init_weights
from model.heads import MaskedLanguageModel, SequenceClassifier

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 130, 500, 1111)
TOLERANCE = 1e-5
"""On the largest difference of a layer's output anywhere, as a share of that output's root mean square (0.9 to 2 here,
so that it reads as an absolute bound too)."""

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "pad_id": 0,
    "cls_id": 1,
    "sep_id": 2,
    # At this width the published 0.02 leaves attention almost uniform, and a wrong theta would drown in rounding.
    "initializer_range": 0.15,
}
SHAPES = {
    "five-layers": EncoderConfig(**SMALL, num_layers=5),
    "uneven-types": EncoderConfig(**SMALL, num_layers=5, layer_types=(SLIDING, FULL, SLIDING, SLIDING, FULL)),
    "local-only": EncoderConfig(**SMALL, num_layers=2, layer_types=(SLIDING, SLIDING), local_attention=16),
    "global-only": EncoderConfig(**SMALL, num_layers=2, layer_types=(FULL, FULL)),
    "biases": EncoderConfig(
        **SMALL, num_layers=4, norm_bias=True, attention_bias=True, mlp_bias=True, local_theta=160_000.0
    ),
}


def random_batch(lengths: tuple[int, ...], vocab_size: int, seed: int = 0) -> PackedBatch:
    generator = np.random.default_rng(seed)
    return pack([generator.integers(3, vocab_size, length) for length in lengths])


def random_weights(module: nn.Module, config: EncoderConfig, seed: int = 0) -> None:
    """As published but for the truncation, which takes ten times as long; and norms and biases moved off 1 and 0, so
    that none can be forgotten unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            else:
                narrow = math.sqrt(2 * config.num_layers) if "Wo" in name else 1
                parameter.copy_(noise * config.initializer_range / narrow)


def random_encoder(config: EncoderConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Encoder:
    encoder = Encoder(config, **options)
    random_weights(encoder, config)
    return encoder.to(dtype)


def layers_of_hugging_face(config: EncoderConfig, encoder: Encoder, batch: PackedBatch) -> list[list[Tensor]]:
    """For every sequence by itself: the embedding, every layer's output, and the final norm's."""
    transformers = pytest.importorskip("transformers")
    from transformers.initialization import no_init_weights

    with no_init_weights():
        theirs = transformers.ModernBertModel(
            transformers.ModernBertConfig(**config.to_hf(), attn_implementation="sdpa")
        )
    theirs.load_state_dict(encoder.state_dict())
    theirs.eval()
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).reshape(-1, config.hidden_size))

    for module in (theirs.embeddings, *theirs.layers, theirs.final_norm):
        module.register_forward_hook(keep)
    layers = []
    for start, stop in pairwise(batch.host_offsets()):
        seen.clear()
        with torch.inference_mode():
            theirs(input_ids=batch.tokens_T[None, start:stop])
        layers.append(list(seen))
    return layers


def assert_parity(config: EncoderConfig, lengths: tuple[int, ...]) -> None:
    encoder = random_encoder(config).eval()
    batch = random_batch(lengths, config.vocab_size)
    ours: list[Tensor] = []
    with torch.inference_mode():
        ours.append(encoder(batch, layer_outputs=ours))
    assert len(ours) == config.num_layers + 2
    worst = torch.zeros(len(ours), len(lengths))
    expected = layers_of_hugging_face(config, encoder, batch)
    for s, (start, stop) in enumerate(pairwise(batch.host_offsets())):
        for i, (layer, theirs) in enumerate(zip(ours, expected[s], strict=True)):
            worst[i, s] = (layer[start:stop] - theirs).abs().max() / theirs.square().mean().sqrt()
    print(f"worst difference by layer {worst.amax(1).tolist()}, by length {worst.amax(0).tolist()}")
    assert worst.max() < TOLERANCE, f"layer and sequence {divmod(int(worst.argmax()), len(lengths))}: {worst.max()}"


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_is_hugging_faces(name: str) -> None:
    assert_parity(SHAPES[name], LENGTHS)


def test_every_layer_is_hugging_faces_at_8192_tokens() -> None:
    assert_parity(SHAPES["five-layers"], (*LENGTHS, 8192))


def test_every_layer_of_base_is_hugging_faces() -> None:
    """All 22 layers up to 1,111 tokens; 8,192 tokens at this width and depth in the slow test below."""
    assert_parity(preset("base", vocab_size=1000, pad_id=0, cls_id=1, sep_id=2, initializer_range=0.04), LENGTHS)


@pytest.mark.slow
def test_every_layer_of_base_is_hugging_faces_at_8192_tokens() -> None:
    assert_parity(
        preset("base", vocab_size=1000, pad_id=0, cls_id=1, sep_id=2, initializer_range=0.04), (*LENGTHS, 8192)
    )


@pytest.mark.parametrize(
    "mistake",
    [
        {"local_attention": 126},
        {"local_attention": 130},
        {"local_theta": 10_100.0},
        {"global_theta": 161_000.0},
        {"layer_types": (FULL, SLIDING, FULL, SLIDING, SLIDING)},
        {"norm_eps": 1e-4},
    ],
    ids=str,
)
def test_parity_sees_a_small_mistake(mistake: dict[str, Any]) -> None:
    """The comparison above has teeth: each of these is at least ten times over its tolerance."""
    config = SHAPES["five-layers"]
    encoder, batch = random_encoder(config), random_batch((300,), 300)
    wrong = random_encoder(EncoderConfig(**SMALL, num_layers=5, **mistake))
    with torch.inference_mode():
        assert (encoder(batch) - wrong(batch)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("layers, reach", [(1, 64), (2, 128)])
def test_local_layers_reach_64_tokens_each(layers: int, reach: int) -> None:
    encoder = random_encoder(EncoderConfig(**SMALL, num_layers=layers, layer_types=(SLIDING,) * layers), torch.float64)
    batch = random_batch((50, 400, 50), 300)
    tokens = batch.tokens_T.clone()
    tokens[50 + 180] = 3 + (tokens[50 + 180] - 2) % 297
    with torch.inference_mode():
        changed = (encoder(batch) != encoder(PackedBatch(tokens, batch.cu_seqlens, 400))).any(dim=1)
    assert (changed.nonzero().flatten() - 50).tolist() == list(range(180 - reach, 180 + reach + 1))


def loss_and_gradients(encoder: Encoder, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    hidden_TD = encoder(batch)
    generator = torch.Generator().manual_seed(5)
    (hidden_TD * torch.randn(hidden_TD.shape, generator=generator).to(hidden_TD)).sum().backward()
    return hidden_TD.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


PATTERNS: dict[str, EncoderConfig] = {
    "global-tokens": EncoderConfig(**SMALL, num_layers=3, local_attention=16, num_global_tokens=2),
    "selected-blocks": EncoderConfig(
        **SMALL, num_layers=3, num_global_tokens=1, sparse_key_blocks=3, sparse_block_size=16
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_the_configuration_reach_the_layers(name: str) -> None:
    batch, plain = random_batch((200, 3, 90), 300), EncoderConfig(**SMALL, num_layers=3, local_attention=16)
    with torch.inference_mode():
        ours, full = (random_encoder(c, attention="blocks")(batch) for c in (PATTERNS[name], plain))
    assert not torch.allclose(ours[:200], full[:200], atol=1e-3)
    assert "blocks in layers with" in random_encoder(PATTERNS[name]).attention_reason


@pytest.mark.parametrize("name", SHAPES | PATTERNS)
def test_blocks_and_reference_agree_in_the_whole_encoder(name: str) -> None:
    """Forward and the gradient of every parameter, float64."""
    config, batch = (SHAPES | PATTERNS)[name], random_batch((1, 200, 64, 65, 130, 2, 129), 300)
    out, gradients = zip(
        *(
            loss_and_gradients(random_encoder(config, torch.float64, attention=a), batch)
            for a in ("blocks", "reference")
        )
    )
    assert out[0].dtype == torch.float64
    torch.testing.assert_close(*out, rtol=0, atol=1e-10)
    assert gradients[0].keys() == dict(Encoder(config).named_parameters()).keys()
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-9, atol=1e-9, msg=key)


def test_forward_is_the_same_with_and_without_gradients() -> None:
    """Without gradients the rotation is in place and rows go through in strips; 5,000 tokens need several."""
    encoder = random_encoder(SHAPES["five-layers"], torch.float64)
    batch = random_batch((2047, 2, 2900, 51), 300)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.inference_mode():
        first, again = encoder(batch), encoder(batch)
    torch.testing.assert_close(first, encoder(batch).detach(), rtol=0, atol=1e-12)
    assert torch.equal(first, again)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_layer_outputs_are_not_overwritten_later() -> None:
    encoder, batch = random_encoder(SHAPES["five-layers"], torch.float64), random_batch((70, 300), 300)
    kept: list[Tensor] = []
    with torch.inference_mode():
        encoder(batch, layer_outputs=kept)
    with_gradient: list[Tensor] = []
    encoder(batch, layer_outputs=with_gradient)
    for a, b in zip(kept, with_gradient, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chosen", [[0], [369, 3, 3, 70], [], list(range(370))])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_selection_has_the_outputs_and_the_gradients_of_the_whole(chosen: list[int], recompute: bool) -> None:
    encoder, batch = random_encoder(SHAPES["five-layers"], torch.float64), random_batch((70, 300), 300)
    encoder.checkpoint_activations = recompute
    select, gradients, outputs = torch.tensor(chosen, dtype=torch.int64), [], []
    for select_M in (None, select):
        encoder.zero_grad()
        hidden = encoder(batch, select_M=select_M)
        outputs.append(hidden if select_M is not None else hidden[select])
        (outputs[-1].sin() * torch.arange(1, len(chosen) + 1)[:, None]).sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    with torch.inference_mode():
        outputs.append(encoder(batch, select_M=select))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-12)
    for mine, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)


def test_documents_are_isolated() -> None:
    """In float64, changing one document moves no other's vectors, and its tokens get no gradient from them."""
    encoder = random_encoder(SHAPES["five-layers"], torch.float64)
    batch = random_batch((40, 1, 150, 129), 300)
    tokens = batch.tokens_T.clone()
    tokens[41:191] = torch.randint(3, 300, (150,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        difference = (encoder(batch) - encoder(PackedBatch(tokens, batch.cu_seqlens, 150))).abs().amax(dim=1)
    assert difference[:41].max() <= 1e-12
    assert difference[191:].max() <= 1e-12
    assert difference[41:191].min() > 1e-6

    own_words = pack([[3, 4, 5], [6, 7, 8, 9]])
    encoder(own_words)[:3].square().sum().backward()
    gradient = encoder.embeddings.tok_embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().amax(dim=1).nonzero().flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_float32_at_both_ends(dtype: torch.dtype) -> None:
    config, batch = SHAPES["five-layers"], random_batch((1, 200, 64, 130), 300)
    exact, wanted = loss_and_gradients(random_encoder(config), batch)
    mixed = random_encoder(config, dtype=torch.float32)
    mixed.compute_dtype = dtype
    hidden_TD, gradients = loss_and_gradients(mixed, batch)
    assert hidden_TD.dtype == torch.float32
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), wanted[key].flatten(), dim=0)
        assert cosine > 0.999, f"{key}: {cosine}"
    assert torch.cosine_similarity(hidden_TD, exact).min() > 0.999


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputing_activations_changes_no_gradient(dtype: torch.dtype | None) -> None:
    encoder, batch = random_encoder(SHAPES["five-layers"]), random_batch((1, 200, 64, 130), 300)
    encoder.compute_dtype = dtype
    kept, wanted = loss_and_gradients(encoder, batch)
    encoder.checkpoint_activations = True
    recomputed, gradients = loss_and_gradients(encoder, batch)
    assert torch.equal(kept, recomputed)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, wanted[key]), key


def test_initialisation_is_the_table_in_its_docstring() -> None:
    config = preset("base", num_layers=2, vocab_size=2000, norm_bias=True, attention_bias=True, num_labels=40)
    narrow = 0.02 / math.sqrt(4)
    expected = {
        "tok_embeddings.weight": 0.02,
        "Wqkv.weight": 0.02,
        "Wi.weight": 0.02,
        "Wo.weight": narrow,
        "dense.weight": narrow,
        "classifier.weight": 768**-0.5,
    }
    # A normal cut at two standard deviations has 0.8796 of the deviation.
    shrink = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    model = SequenceClassifier(Encoder(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    init_weights(model, config, torch.Generator().manual_seed(0))
    seen = set()
    for name, parameter in model.named_parameters():
        row = next((row for row in expected if name.endswith(row)), None)
        if row is None:
            assert name.endswith(".bias") or "norm" in name, f"{name} is in no row of the table"
            assert torch.all(parameter == (0 if name.endswith(".bias") else 1)), name
            continue
        seen.add(row)
        assert parameter.std().item() == pytest.approx(shrink * expected[row], rel=0.03), name
        assert abs(parameter.mean().item()) < 0.02 * expected[row], name
        assert parameter.abs().max() <= 2 * expected[row] + 1e-7, name
        assert parameter.abs().max() > 1.9 * expected[row], name
    assert seen == set(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_is_the_embedding_where_tied(tied: bool) -> None:
    config = EncoderConfig(
        **SMALL | {"vocab_size": 3000, "initializer_range": 0.02}, num_layers=2, tie_word_embeddings=tied
    )
    model = MaskedLanguageModel(Encoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    embedding = model.model.embeddings.tok_embeddings.weight
    assert (model.decoder.weight is embedding) == tied
    assert embedding.std().item() == pytest.approx(0.8796 * 0.02, rel=0.02)
    assert model.decoder.weight.std().item() == pytest.approx(0.8796 * 0.02 / (1 if tied else 2), rel=0.02)
    assert not model.decoder.bias.any()


def test_same_seed_same_weights() -> None:
    first, again = (random_encoder(SHAPES["biases"]).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ["base", "large", "ettin-17m"])
def test_parameters_are_counted_right(name: str) -> None:
    encoder = Encoder(preset(name), device="meta", attention="blocks")
    assert preset(name).num_parameters() == sum(p.numel() for p in encoder.parameters())
    body = sum(p.numel() for n, p in encoder.named_parameters() if not n.startswith("embeddings.tok"))
    assert preset(name).num_parameters(embeddings=False) == body


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend, dtype", [("xformers", torch.float16), ("varlen", torch.bfloat16)])
def test_gpu_encoder_agrees_with_float32_on_the_cpu(backend: str, dtype: torch.dtype) -> None:
    config, batch = SHAPES["five-layers"], random_batch(LENGTHS, 300)
    exact, wanted = loss_and_gradients(random_encoder(config), batch)
    encoder = random_encoder(config, device="cuda", attention="auto").to("cuda")
    encoder.compute_dtype, encoder.attention = dtype, backend
    hidden_TD, gradients = loss_and_gradients(encoder, batch.to("cuda"))
    assert torch.cosine_similarity(hidden_TD.cpu(), exact).min() > 0.999
    for key, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.cpu().flatten(), wanted[key].flatten(), dim=0) > 0.995, key
