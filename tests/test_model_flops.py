"""FLOPs and bytes against brute force: torch's own counter on Hugging Face's model, and operands seen in flight."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.batch import pack
from model.config import preset
from model.encoder import Encoder
from model.flops import PASSES, cost, linear_weights, selected_pairs, share_of_ceiling, visible_pairs
from model.heads import MaskedLanguageModel
from model.losses import IGNORED, Pretraining
from model.patterns import Pattern, visible
from model.sparse import selected_mask

SMALL = preset(
    "base",
    vocab_size=99,
    hidden_size=64,
    intermediate_size=80,
    num_layers=4,
    num_heads=2,
    local_attention=16,
    pad_id=0,
    cls_id=1,
    sep_id=2,
)


def brute_pairs(length: int, window: int | None, num_global: int = 0) -> int:
    return int(visible(pack([[1] * length]), Pattern(window, num_global=num_global)).sum())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 17, 64, 65, 300])
@pytest.mark.parametrize("window", [None, 1, 8, 64])
def test_visible_pairs_are_the_ones_in_the_mask(length: int, window: int | None) -> None:
    assert visible_pairs(length, window) == brute_pairs(length, window)


@given(st.integers(1, 80), st.integers(0, 90), st.integers(0, 90))
def test_visible_pairs_of_any_length(length: int, window: int, first: int) -> None:
    by_hand = sum(abs(i - j) <= window for i in range(length) for j in range(length))
    assert visible_pairs(length, window) == by_hand
    assert visible_pairs(length, window, first) == brute_pairs(length, window, first)


@given(st.integers(1, 100), st.integers(2, 5), st.sampled_from([1, 8, 16]), st.integers(0, 1))
@settings(deadline=None)
def test_selected_pairs_are_the_ones_in_the_mask(length: int, key_blocks: int, size: int, first: int) -> None:
    q, k = torch.randn(2, length, 1, 4, generator=torch.Generator().manual_seed(length))
    seen = int(selected_mask(q, k, (0, length), key_blocks, size, first).sum())
    blocks = -(-length // size)
    scores = blocks**2 // 2 if blocks > key_blocks else 0
    counted = selected_pairs(length, key_blocks, size, first) - scores
    assert counted == seen if length % size == 0 else seen <= counted < seen + length * size


def test_the_patterns_of_a_configuration_are_counted() -> None:
    config = dataclasses.replace(SMALL, num_global_tokens=2, sparse_key_blocks=3, sparse_block_size=8)
    assert config.layer_types.count("full_attention") == 2
    pairs = 2 * selected_pairs(100, 3, 8, 2) + 2 * visible_pairs(100, 8, 2)
    assert cost(config, [100]).attention_flops == 4 * SMALL.hidden_size * pairs
    assert cost(config, [100]).attention_flops < cost(SMALL, [100]).attention_flops


@pytest.mark.parametrize("length", [1, 33, 130])
def test_linear_flops_are_those_of_hugging_face(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertConfig(**SMALL.to_hf(), attn_implementation="eager")
    theirs = transformers.ModernBertModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(input_ids=torch.ones(1, length, dtype=torch.long))
    by_operator = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = by_operator["aten.mm"] + by_operator.get("aten.addmm", 0)
    dense = by_operator["aten.bmm"]
    ours = cost(SMALL, [length])
    assert ours.linear_flops == products
    # Eager attention computes every pair in every layer; ours counts the windowed ones as windowed.
    assert dense == SMALL.num_layers * 4 * SMALL.hidden_size * length**2
    assert ours.attention_flops <= SMALL.num_layers * 4 * SMALL.hidden_size * length**2


def test_attention_flops_are_four_a_visible_pair_and_unit_of_width() -> None:
    lengths = [1, 5, 9, 40]
    full = sum(brute_pairs(n, None) for n in lengths)
    local = sum(brute_pairs(n, SMALL.window) for n in lengths)
    assert SMALL.layer_types.count("full_attention") == 2
    assert cost(SMALL, lengths).attention_flops == 4 * SMALL.hidden_size * (2 * full + 2 * local)


def test_training_is_what_autograd_runs() -> None:
    """Exactly three forward passes' worth: the first layer's input needs its gradient too, for the embedding."""
    config = dataclasses.replace(SMALL, layer_types=("full_attention",) * 4)
    encoder = Encoder(config, attention="reference")
    with FlopCounterMode(display=False) as counter:
        encoder(pack([[1] * 23])).sum().backward()
    counted = counter.get_total_flops()
    assert counted == cost(config, [23], mode="training").flops
    assert cost(config, [23], mode="recompute").flops == 4 * cost(config, [23]).flops


class Traffic(TorchDispatchMode):
    """Adds up the bytes of operands and results of two-dimensional matrix products."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.moved += sum(t.numel() * t.element_size() for t in (args[0], args[1], out))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_operands_and_results(dtype: torch.dtype) -> None:
    encoder = Encoder(SMALL, attention="reference").to(dtype)
    with torch.no_grad(), Traffic() as traffic:
        encoder(pack([[1] * 11, [2] * 30]))
    attention_bytes = SMALL.num_layers * 4 * 41 * SMALL.hidden_size * dtype.itemsize
    assert cost(SMALL, [11, 30], bytes_per_value=dtype.itemsize).bytes_moved == traffic.moved + attention_bytes


def test_head_counts_predicted_tokens_only() -> None:
    bare, with_head = cost(SMALL, [50]), cost(SMALL, [50], predicted_tokens=15)
    assert bare.head_flops == 0
    assert with_head.head_flops == 2 * 15 * SMALL.hidden_size * (SMALL.hidden_size + SMALL.vocab_size)
    assert cost(SMALL, [50], predicted_tokens=50).bytes_moved > bare.bytes_moved
    unread = 35 * sum(inputs * outputs for inputs, outputs in linear_weights(SMALL)[1:])  # in the last layer
    assert bare.linear_flops - with_head.linear_flops == 2 * unread


def test_pretraining_is_what_autograd_runs() -> None:
    """The last layer is left after attention for all tokens but those that are predicted."""
    config = dataclasses.replace(SMALL, layer_types=("full_attention",) * 4)
    model = Pretraining(MaskedLanguageModel(Encoder(config, attention="reference")))
    predicted = torch.tensor([3, 4, 20])
    with FlopCounterMode(display=False) as counter:
        model(pack([[1] * 23]), predicted, predicted, torch.tensor([IGNORED]))[0].backward()
    counted = counter.get_total_flops()
    assert counted == cost(config, [23], mode="training", predicted_tokens=3).flops


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_a_batch_costs_what_its_sequences_cost(lengths: list[int]) -> None:
    alone = [cost(SMALL, [n]) for n in lengths]
    together = cost(SMALL, lengths)
    assert together.flops == sum(one.flops for one in alone)
    # Weights are read once a batch, however many sequences share it.
    weights = SMALL.num_layers * sum(i * o for i, o in linear_weights(SMALL)) * 2
    assert together.bytes_moved == sum(one.bytes_moved for one in alone) - (len(lengths) - 1) * weights
    assert together.intensity >= max(one.intensity for one in alone) * 0.5


def test_base_is_about_two_flops_a_parameter_and_token() -> None:
    base = preset("base")
    body = base.num_parameters(embeddings=False)
    assert cost(base, [1]).linear_flops == pytest.approx(2 * body, rel=0.001)


def test_share_of_ceiling() -> None:
    batch_cost = cost(SMALL, [100])
    assert share_of_ceiling(batch_cost, 2.0, batch_cost.flops) == pytest.approx(0.5)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="every sequence needs a token"):
        cost(SMALL, [3, 0])
    assert set(PASSES) == {"forward", "training", "recompute"}
