"""Text out of a decoder: prompts are read together in one packed batch, then every sequence grows by a token a step.

What a sequence becomes depends on its prompt, the settings and its seed, never on its neighbours: each has a generator
of its own, of which every token takes one number. (Up to rounding: a number may fall on the border of two tokens.)
Shape suffixes: S sequences, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import pack
from model.decoder import CausalLanguageModel
from model.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Of those, only the likeliest that together reach this share; the likeliest itself always stays."""
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    """A sequence ends where one of these would come next; it is not handed out."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; ask for one at least")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it is 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it is 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it is 0 or more, and below 2**63")


def distribution(logits_SV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from, at a temperature above 0.

    Returns:
        Tokens by falling probability, and their probabilities in float64; (S, V) each, or (S, top_k).
    """
    scaled_SV = logits_SV.double() / sampling.temperature
    if 0 < sampling.top_k < scaled_SV.shape[1]:
        sorted_SV, tokens_SV = scaled_SV.topk(sampling.top_k, dim=1)
    else:
        sorted_SV, tokens_SV = scaled_SV.sort(dim=1, descending=True)
    p_SV = sorted_SV.softmax(dim=1)
    # A token stays while those before it do not reach the share yet.
    p_SV = p_SV * (p_SV.cumsum(dim=1) - p_SV < sampling.top_p)
    p_SV[:, 0].clamp_(min=torch.finfo(p_SV.dtype).tiny)
    return tokens_SV, p_SV / p_SV.sum(dim=1, keepdim=True)


def choose(logits_SV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of every sequence, (S,); each generator gives one number where there is chance."""
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=1)
    tokens_SV, p_SV = distribution(logits_SV, sampling)
    drawn = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    total_SV = p_SV.cumsum(dim=1)
    # Below the sum as it was rounded, so that no token of probability 0 is taken.
    draw_S1 = torch.stack(drawn).to(p_SV.device) * total_SV[:, -1:]
    index_S1 = torch.searchsorted(total_SV, draw_S1, right=True)
    last_S1 = (p_SV > 0).sum(dim=1, keepdim=True) - 1
    return tokens_SV.gather(1, index_S1.minimum(last_S1)).squeeze(1)


@torch.inference_mode()
def _steps(
    model: CausalLanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    """For every step the sequences that go on, and their new tokens."""
    longest = model.model.config.max_tokens
    device = model.model.embeddings.tok_embeddings.weight.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    left = [min(sampling.max_new_tokens, longest - len(prompt)) for prompt in prompts]
    rows = list(range(len(prompts)))  # the sequence that each row of the cache belongs to
    cache = model.model.new_cache(len(rows))
    batch = pack(prompts).to(device)
    hidden_SD = model.model.prefill(batch, cache)[batch.cu_seqlens[1:].long() - 1]
    while True:
        tokens_S = choose(model.predict(hidden_SD), sampling, generators)
        tokens = tokens_S.tolist()
        going = [i for i, token in enumerate(tokens) if left[rows[i]] > 0 and token not in sampling.stop_tokens]
        yield [(rows[i], tokens[i]) for i in going]
        for i in going:
            left[rows[i]] -= 1
        on = [i for i in going if left[rows[i]] > 0]
        if not on:
            return
        if len(on) < len(rows):
            cache.keep(on)
            rows, generators, tokens_S = [rows[i] for i in on], [generators[i] for i in on], tokens_S[on]
        hidden_SD = model.model.step(tokens_S, cache)


def stream(
    model: CausalLanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """New tokens as they come, as (number of the prompt, token): a round of all sequences that go on, then the next.

    A sequence ends at a stop token, after `max_new_tokens`, or when it is as long as the model reads.

    Args:
        prompts: token ids, of any lengths.
        seeds: one for each prompt; `sampling.seed` for all by default, so that equal prompts go on equally.

    Raises:
        InputError: no prompt, an empty one, one that is longer than the model reads, an unknown token.
    """
    config = model.model.config
    if not prompts:
        raise InputError("there is no prompt to go on from")
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.max_tokens:
            raise InputError(f"prompt {number} has {len(prompt)} tokens; the model reads 1 to {config.max_tokens}")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise InputError(f"prompt {number} has a token that is not among the model's {config.vocab_size}")
    if seeds is None:
        seeds = [sampling.seed] * len(prompts)
    elif len(seeds) != len(prompts):
        raise InputError(f"{len(prompts)} prompts have {len(seeds)} seeds; give each its own")
    return (pair for pairs in _steps(model, prompts, sampling, seeds) for pair in pairs)


def generate(
    model: CausalLanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt; arguments and errors as for `stream`."""
    out: list[list[int]] = [[] for _ in prompts]
    for number, token in stream(model, prompts, sampling, seeds):
        out[number].append(token)
    return out
