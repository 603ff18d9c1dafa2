"""FLOPs and bytes of a batch, from the shape of the encoder and the lengths of its sequences alone.

Counted is what the mathematics needs, not what a kernel happens to do: a multiplication and an addition are two FLOPs,
a windowed layer counts the keys inside the window, padding does not exist. Norms, rotary positions and activations are
left out (below 1 % of a base encoder). So these FLOPs a second, over a ceiling, are an honest share of the ceiling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import FULL, EncoderConfig

Mode = Literal["forward", "training", "recompute"]

PASSES: dict[Mode, int] = {"forward": 1, "training": 3, "recompute": 4}
"""Forward passes' worth of work. A backward pass has two products for each of the forward's (for the input's gradient
and for the weight's; attention likewise four for two); "recompute" is training with activation checkpoints, which runs
the forward pass once more."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one batch costs."""

    linear_flops: int
    """Projections and feed-forward layers."""
    attention_flops: int
    """Scores and weighted sums, over the visible query-key pairs only."""
    head_flops: int
    """The masked-token head, 0 without one."""
    bytes_moved: int
    """Least traffic to memory: operands of products read once, results written once, softmax never written."""

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops + self.head_flops

    @property
    def intensity(self) -> float:
        """FLOPs per byte; below a machine's ratio of FLOP/s to bytes/s, memory is the limit."""
        return self.flops / self.bytes_moved


def visible_pairs(length: int, window: int | None, num_global: int = 0) -> int:
    """Query-key pairs that one sequence attends over.

    Of 4 tokens with a window of 1, the queries see 2, 3, 3 and 2 keys: visible_pairs(4, 1) is 10. If the first sees and
    is seen by all, it is 14.

    Args:
        length: tokens of the sequence.
        window: reach to each side; None sees everything.
        num_global: first tokens that see and are seen by all, whatever the window.
    """
    # Pairs that are out of sight are those of the other tokens among themselves.
    rest = max(0, length - num_global)
    if window is None or rest <= window + 1:
        return length * length
    return length * length - rest * rest + rest * (2 * window + 1) - window * (window + 1)


def selected_pairs(length: int, key_blocks: int | None, block_size: int, num_global: int = 0) -> int:
    """Query-key pairs in a layer that selects blocks of keys (`model.sparse`), and those of the blocks' scores.

    As if every selected block were full: a short one at the end, where it is selected, makes it up to
    `block_size - 1` keys fewer. Scores are half the work of a pair and count half.
    """
    if key_blocks is None or length <= key_blocks * block_size:
        return length * length
    first = min(num_global, length)
    selected = first * length + (length - first) * key_blocks * block_size
    return selected + (-(-length // block_size)) ** 2 // 2


def linear_weights(config: EncoderConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the products of one layer: Wqkv, Wo, Wi and the feed-forward Wo."""
    d, m = config.hidden_size, config.intermediate_size
    return [(d, 3 * d), (d, d), (d, 2 * m), (m, d)]


def cost(
    config: EncoderConfig,
    lengths: Iterable[int],
    *,
    mode: Mode = "forward",
    predicted_tokens: int = 0,
    bytes_per_value: int = 2,
) -> Cost:
    """What a packed batch costs.

    Args:
        config: the shape of the encoder.
        lengths: tokens of each sequence, special tokens included.
        mode: "forward"; "training", forward and backward; "recompute", training with activation checkpoints.
        predicted_tokens: masked tokens that go through the masked-token head; 0 without one. The last layer's work
            after attention counts for these only: nothing is taken from its other tokens.
        bytes_per_value: of weights and activations in the products: 2 for bfloat16, 4 for float32.

    Raises:
        ValueError: a sequence without a token.
    """
    sequences: Sequence[int] = list(lengths)
    if any(length < 1 for length in sequences):
        raise ValueError("every sequence needs a token")
    num_tokens, d = sum(sequences), config.hidden_size
    first = config.num_global_tokens
    full_pairs = sum(selected_pairs(n, config.sparse_key_blocks, config.sparse_block_size, first) for n in sequences)
    local_pairs = sum(visible_pairs(n, config.window, first) for n in sequences)

    linear_flops = attention_flops = head_flops = values = 0
    for layer_type in config.layer_types:
        for inputs, outputs in linear_weights(config):
            linear_flops += 2 * num_tokens * inputs * outputs
            values += num_tokens * (inputs + outputs) + inputs * outputs
        attention_flops += 4 * d * (full_pairs if layer_type == FULL else local_pairs)
        values += 4 * num_tokens * d  # queries, keys and values in, one result out
    if predicted_tokens:
        for inputs, outputs in linear_weights(config)[1:]:  # the last layer's, after Wqkv
            linear_flops -= 2 * (num_tokens - predicted_tokens) * inputs * outputs
            values -= (num_tokens - predicted_tokens) * (inputs + outputs)
        for inputs, outputs in ((d, d), (d, config.vocab_size)):
            head_flops += 2 * predicted_tokens * inputs * outputs
            values += predicted_tokens * (inputs + outputs) + inputs * outputs
    passes = PASSES[mode]
    return Cost(passes * linear_flops, passes * attention_flops, passes * head_flops, passes * values * bytes_per_value)


def share_of_ceiling(batch_cost: Cost, seconds: float, flops_per_s: float) -> float:
    """The part of a measured ceiling (FLOP/s of plain matrix products) that a run reached; 1.0 is all of it."""
    return batch_cost.flops / seconds / flops_per_s
