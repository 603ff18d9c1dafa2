"""How many tokens of a batch fit into a device's memory, by arithmetic: before anything has run, and without a trial.

Counted per token is what is alive at the worst moment; a share of the memory is left for what is not counted (the
allocator's fragments, workspaces of libraries, a table of rotary angles). T tokens, D width, I intermediate size.
"""

from model.config import QUERY_BLOCK, EncoderConfig
from model.flops import Mode

SPARE = 0.2
"""Share of the free memory that a plan leaves alone."""
WIDE = 4
"""Bytes of the residual stream, the norms and everything the optimizer keeps: float32."""
STRIP_TOKENS = 2_048
"""Without a gradient the feed-forward part runs in strips of about so many tokens (`model.attention.ROWS`)."""


def weight_bytes(config: EncoderConfig, mode: Mode, bytes_per_value: int = 2) -> int:
    """Of an encoder that is loaded: products in the compute dtype, the embedding in float32; for training, weights,
    gradients and two moments in float32."""
    if mode != "forward":
        return 4 * WIDE * config.num_parameters()
    products = config.num_parameters(embeddings=False)
    return bytes_per_value * products + WIDE * config.vocab_size * config.hidden_size


def token_bytes(config: EncoderConfig, mode: Mode, bytes_per_value: int = 2) -> int:
    """What one more token takes.

    forward: residual stream, normed input, query, key and value; their copies in blocks, of QUERY_BLOCK queries and of
    keys and values with a window to each side, and the bias of a block (the back-end that needs most); the result
    twice, as attention and as the encoder give it. training: what every layer keeps for its backward pass: the inputs
    of both norms, of four products, of attention and of GeGLU. recompute: the stream before each layer, and one layer's
    worth of the rest.
    """
    d, i, b = config.hidden_size, config.intermediate_size, bytes_per_value
    if mode == "forward":
        keys = QUERY_BLOCK + 2 * config.window
        blocks = b * d + 2 * b * d * keys / QUERY_BLOCK + b * keys
        return int(WIDE * d + b * d + 3 * b * d + blocks + b * d + WIDE * d)
    # Queries and keys are kept as they were turned, beside the projection that values are a view of.
    layer = 2 * WIDE * d + 2 * b * d + 5 * b * d + b * d + 4 * b * i
    if mode == "training":
        return config.num_layers * layer + WIDE * d
    return config.num_layers * WIDE * d + layer


def fitting_tokens(
    config: EncoderConfig, free_bytes: int, mode: Mode = "forward", *, loaded: bool = True, bytes_per_value: int = 2
) -> int:
    """The largest batch that fits, in tokens; 0 where not even the weights do.

    Args:
        free_bytes: of the device.
        loaded: whether the weights are there already, and not part of what is free.
    """
    room = free_bytes * (1 - SPARE)
    if not loaded:
        room -= weight_bytes(config, mode, bytes_per_value)
    if mode == "forward":
        room -= STRIP_TOKENS * 3 * config.intermediate_size * bytes_per_value
    return max(0, int(room // token_bytes(config, mode, bytes_per_value)))
