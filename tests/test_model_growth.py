"""Context extension that really changes the rotary positions, and tiling that keeps heads and layers together."""

import pytest
import torch

from model.batch import PackedBatch, pack
from model.config import EncoderConfig, preset
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.growth import centred, extend_context, tile
from model.heads import MaskedLanguageModel


def shape(initializer_range: float = 0.3, **changes: int) -> EncoderConfig:
    values = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 2}
    return EncoderConfig(**values | changes, initializer_range=initializer_range, global_theta=10_000.0, max_tokens=64)


def model_of(config: EncoderConfig, seed: int = 0) -> MaskedLanguageModel:
    model = MaskedLanguageModel(Encoder(config))
    init_weights(model, config, torch.Generator().manual_seed(seed))
    return model.double()


def batch_of(*lengths: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(50, (n,), generator=generator).numpy() for n in lengths])


def test_context_extension_is_a_new_encoder_with_the_new_theta() -> None:
    """Not only in the configuration: the table that a forward pass had cached before must be gone."""
    model = model_of(shape())
    batch = batch_of(200, 3)
    before = model.model(batch)
    extend_context(model.model, max_tokens=512, global_theta=160_000.0)
    after = model.model(batch)
    fresh = Encoder(model.model.config).double()
    fresh.load_state_dict(model.model.state_dict())
    assert torch.equal(after, fresh(batch))
    assert (after - before).abs().max() > 1e-3
    assert (model.model.config.max_tokens, model.model.config.global_theta) == (512, 160_000.0)
    assert model.model.config.local_theta == 10_000.0
    assert model.model.config.to_hf()["rope_parameters"]["full_attention"]["rope_theta"] == 160_000.0


def test_centred_wraps_around() -> None:
    assert centred(3, 7).tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert centred(4, 4).tolist() == [0, 1, 2, 3]
    # Where the paper's sizes meet: 768 features in the middle of 1024, two whole heads on either side.
    assert centred(768, 1024)[128:896].tolist() == list(range(768))


def test_tiling_to_the_same_shape_copies() -> None:
    small, large = model_of(shape()), model_of(shape(), seed=1)
    tile(small, large)
    for mine, theirs in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_heads_stay_whole_and_layers_stretch() -> None:
    small = model_of(shape())
    large = model_of(shape(hidden_size=32, num_heads=4, intermediate_size=36, num_layers=6), seed=1)
    tile(small, large)
    before, after = dict(small.named_parameters()), dict(large.named_parameters())
    # Layer 4 of 6 comes from layer 2 of 4; heads 0..3 from 1, 0, 1, 0; features from 8 on either side.
    old = before["model.layers.2.attn.Wqkv.weight"].reshape(3, 2, 8, 16)
    new = after["model.layers.4.attn.Wqkv.weight"].reshape(3, 4, 8, 32)
    columns = centred(16, 32)
    for head, origin in enumerate((1, 0, 1, 0)):
        assert torch.equal(new[:, head], old[:, origin][..., columns])
    wi, old_wi = after["model.layers.4.mlp.Wi.weight"], before["model.layers.2.mlp.Wi.weight"]
    assert torch.equal(wi[6:30, 8:24], old_wi[:24]), "the value half, centred"
    assert torch.equal(wi[42:66, 8:24], old_wi[24:]), "the gate half, centred in its own half"
    assert torch.equal(after["model.layers.1.attn_norm.weight"], before["model.layers.1.attn_norm.weight"][columns])
    embedding = after["model.embeddings.tok_embeddings.weight"]
    assert torch.equal(embedding, before["model.embeddings.tok_embeddings.weight"][:, columns])
    assert large.decoder.weight is embedding
    assert torch.equal(after["decoder.bias"], before["decoder.bias"])


def test_a_tiled_model_predicts_like_its_origin() -> None:
    """Twice as wide with every feature doubled, the large model ranks tokens much as the small one does.

    Not with wide weights: products of doubled features are twice as large, as published, which attention feels.
    """
    small = model_of(shape(0.1))
    large, random = (model_of(shape(0.1, hidden_size=32, num_heads=4, intermediate_size=48), seed=1) for _ in "ab")
    tile(small, large)
    batch = batch_of(40, 30)

    def likeness(model: MaskedLanguageModel) -> float:
        stack = torch.stack([model(batch).flatten(), small(batch).flatten()])
        return torch.corrcoef(stack)[0, 1].item()

    assert likeness(large) > 0.5 > abs(likeness(random))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"vocab_size": 60}, "vocab_size"),
        ({"num_heads": 4}, "head_size"),
        ({"num_layers": 3}, "larger"),
        ({"classifier_bias": True}, "classifier_bias True cannot grow out of one with False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False cannot grow out of one with True"),
        ({"norm_bias": True}, "norm_bias"),
    ],
)
def test_what_cannot_grow_is_one_line(changes: dict[str, int], word: str) -> None:
    with pytest.raises(InputError, match=word):
        tile(model_of(shape()), model_of(shape(**changes)))


def test_a_single_layer_has_no_attention_norm_to_repeat() -> None:
    tile(model_of(shape(num_layers=1)), model_of(shape(num_layers=1), seed=1))
    with pytest.raises(InputError, match="a model of one layer has no attention norm"):
        tile(model_of(shape(num_layers=1)), model_of(shape(num_layers=2)))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_every_parameter_has_an_origin(changes: dict[str, int]) -> None:
    small = model_of(shape(**changes))
    large = model_of(shape(**changes, hidden_size=32, num_heads=4, intermediate_size=36, num_layers=8), seed=1)
    with torch.no_grad():
        for value, parameter in enumerate(small.parameters(), 2):
            parameter.fill_(value)  # so that each tells where it came from
    tile(small, large)
    before, after = dict(small.named_parameters()), dict(large.named_parameters())
    for name, parameter in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) // 2)
            if parts[2:4] == ["0", "attn_norm"]:
                parts[2] = "1"
        assert (parameter == before[".".join(parts)].flatten()[0]).all(), name


def test_published_shapes_fit() -> None:
    base, large = (preset(name, num_layers=3, vocab_size=64) for name in ("base", "large"))
    small, grown = (MaskedLanguageModel(Encoder(config)) for config in (base, large))
    tile(small, grown)
    middle = grown.model.layers[1].attn.Wo.weight[128:896, 128:896]  # type: ignore[union-attr, index]
    assert torch.equal(middle, small.model.layers[1].attn.Wo.weight)  # type: ignore[union-attr]
