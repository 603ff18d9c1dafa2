"""Cached decoding against recomputation, token for token, over the wrap of the ring and the ends of pages; memory."""

from typing import Any

import numpy as np
import pytest
import torch
from test_model_decoder import CONVENTIONS, random_decoder, random_sequences

from model.batch import pack
from model.cache import PAGE, Pages, bytes_per_token, cache_bytes
from model.config import FULL, SLIDING, preset
from model.decoder import CausalLanguageModel

PROMPTS = (1, 63, 64, 65, 66, 200)


@torch.inference_mode()
def worst_difference(model: CausalLanguageModel, prompts: tuple[int, ...], steps: int) -> float:
    """Of any logit, cached against recomputed from the whole sequences, as a share of the logits' root mean square."""
    whole = random_sequences(tuple(length + steps for length in prompts))
    batch = pack(whole)
    starts = np.array(batch.host_offsets()[:-1]) + prompts
    expected = model(batch)
    cache, read = model.model.new_cache(len(prompts)), pack([w[:p] for w, p in zip(whole, prompts, strict=True)])
    hidden = model.model.prefill(read, cache)[read.cu_seqlens[1:].long() - 1]
    worst = 0.0
    for step in range(steps + 1):
        difference = model.predict(hidden) - expected[torch.from_numpy(starts + step - 1)]
        worst = max(worst, (difference.abs().max() / expected.square().mean().sqrt()).item())
        if step < steps:
            tokens = torch.tensor([w[p + step] for w, p in zip(whole, prompts, strict=True)])
            hidden = model.model.step(tokens, cache)
    assert cache.length_S.tolist() == [p + steps for p in prompts]
    return worst


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_cached_is_recomputed(convention: str) -> None:
    """150 steps: every ring wraps twice and more, generated tokens fill two pages and begin a third."""
    window = CONVENTIONS[convention]
    assert worst_difference(random_decoder(sliding_window=window), PROMPTS, 150) < 1e-5
    assert worst_difference(random_decoder(torch.float64, sliding_window=window), PROMPTS, 150) < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": (SLIDING,) * 4, "local_attention": 8},
        {"layer_types": (FULL,) * 4},
        {"local_attention": 2},
    ],
    ids=str,
)
def test_other_shapes(changes: dict[str, Any]) -> None:
    assert worst_difference(random_decoder(torch.float64, **changes), (3, 1, 70), 20) < 1e-12


def test_half_precision_stays_near() -> None:
    model = random_decoder()
    exact = model(pack(random_sequences((200,)))).square().mean().sqrt()
    model.model.compute_dtype = torch.bfloat16
    assert exact > 0.1
    assert worst_difference(model, (1, 70, 130), 70) < 0.1


@torch.inference_mode()
def test_sequences_leave_and_the_others_go_on_as_before() -> None:
    model, prompts = random_decoder(torch.float64), random_sequences((5, 130, 64, 200))
    batch, tokens = pack(prompts), torch.arange(3, 7)
    caches = [model.model.new_cache(4) for _ in range(2)]
    for cache in caches:
        model.model.prefill(batch, cache)
        model.model.step(tokens, cache)
    caches[1].keep([0, 2])
    assert caches[1].nbytes() < caches[0].nbytes()
    for _ in range(70):
        all_four = model.model.step(tokens, caches[0])
        two = model.model.step(tokens[[0, 2]], caches[1])
        torch.testing.assert_close(all_four[[0, 2]], two, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_pages_are_few_whatever_the_lengths() -> None:
    """As many of prompts as there are lengths, in whole pages; of generated tokens one for each bit of their number.
    Before and after the page of 300 tokens is gone, and over six merges.
    """
    model, steps = random_decoder(torch.float64), 5 * PAGE + 3
    whole = random_sequences((3 + steps, 60 + steps, 190 + steps, 300 + steps))
    prompts = [w[:-steps] for w in whole]
    cache = model.model.new_cache(4)
    model.model.prefill(pack(prompts), cache)
    for step in range(steps):
        if step == 2 * PAGE:
            cache.keep([0, 1, 2])
        rows = whole if step < 2 * PAGE else whole[:3]
        hidden = model.model.step(torch.tensor([w[step - steps] for w in rows]), cache)
    pages = cache.layers[0]
    assert isinstance(pages, Pages)
    assert [page.size for page in pages.prompts] == [PAGE, 2 * PAGE]
    assert [page.size for page in pages.steps_taken] == [4 * PAGE, PAGE, PAGE]
    assert [page.used_S.tolist() for page in pages.prompts] == [[3, 60, 64], [126]]
    batch = pack(whole[:3])
    torch.testing.assert_close(model.predict(hidden), model(batch)[batch.cu_seqlens[1:].long() - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_memory_is_as_predicted(dtype: torch.dtype) -> None:
    model = random_decoder()
    model.model.compute_dtype = dtype
    cache = model.model.new_cache(len(PROMPTS))
    model.model.prefill(pack(random_sequences(PROMPTS)), cache)
    sizes = [cache.nbytes()]
    for _ in range(2 * PAGE + 1):
        model.model.step(torch.full((len(PROMPTS),), 5), cache)
        sizes.append(cache.nbytes())
    config = model.model.config
    assert sizes == [cache_bytes(config, PROMPTS, steps, dtype) for steps in range(len(sizes))]
    # Over whole pages, what a token takes.
    grown = sizes[2 * PAGE] - sizes[PAGE]
    assert grown == len(PROMPTS) * PAGE * bytes_per_token(config, dtype)


def test_memory_of_base() -> None:
    """The numbers of the docstring: 8 global layers of 22, 64 keys in a ring."""
    config = preset("base", causal=True)
    assert bytes_per_token(config, torch.bfloat16) == 8 * 2 * 768 * 2 == 24_576
    assert cache_bytes(config, [PAGE], 0, torch.bfloat16) - PAGE * 24_576 == 14 * 64 * 2 * 768 * 2
