"""Greedy text against Hugging Face's `generate`; sampling against its filters; seeds, stops, streaming, bad input."""

from typing import Any

import pytest
import torch
from test_model_decoder import CONVENTIONS, hugging_face, random_decoder, random_sequences
from torch import Tensor

from model.decoder import CausalLanguageModel
from model.errors import InputError
from model.generation import Sampling, choose, distribution, generate, stream

PROMPTS = (1, 63, 64, 65, 66, 200)
STEPS = 300


def prompts_of(*lengths: int) -> list[list[int]]:
    return [sequence.tolist() for sequence in random_sequences(lengths)]


def theirs_greedy(model: CausalLanguageModel, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Hugging Face's way with uneven prompts: one batch, padded on the left."""
    theirs, longest = hugging_face(model), max(map(len, prompts))
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_greedy_text_is_hugging_faces(convention: str) -> None:
    model, prompts = random_decoder(sliding_window=CONVENTIONS[convention]), prompts_of(*PROMPTS)
    ours = generate(model, prompts, Sampling(max_new_tokens=STEPS))
    assert [len(text) for text in ours] == [STEPS] * len(prompts)
    assert ours == theirs_greedy(model, prompts, STEPS)
    assert min(len(set(text)) for text in ours) > 5  # not the same word over and over: that would prove little


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}],
    ids=str,
)
def test_what_is_drawn_from_is_hugging_faces(settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    sampling = Sampling(**{"temperature": 1.0} | settings)
    logits = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    expected = warpers(torch.zeros(50, 1, dtype=torch.int64), logits).softmax(dim=1)
    tokens, p = distribution(logits, sampling)
    torch.testing.assert_close(torch.zeros(50, 300, dtype=p.dtype).scatter(1, tokens, p), expected)


def drawn(logits: Tensor, count: int, **settings: Any) -> Tensor:
    """How often each token is taken, as a share."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    tokens = choose(logits.expand(count, -1), Sampling(temperature=1.0, **settings), generators)
    return tokens.bincount(minlength=logits.shape[1]) / count


def test_tokens_are_drawn_as_often_as_is_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -50.0, 1.5]])
    assert (drawn(logits, 4000) - logits.softmax(dim=1)[0]).abs().max() < 0.03
    cut = drawn(logits, 2000, top_k=2)
    assert cut.nonzero().flatten().tolist() == [1, 4]
    assert cut[4].item() == pytest.approx(0.378, abs=0.04)
    assert drawn(logits, 200, top_p=1e-9).tolist() == [0, 1, 0, 0, 0]


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    model, prompts = random_decoder(), prompts_of(*PROMPTS)
    sampling = Sampling(max_new_tokens=40, temperature=0.9, top_k=50, top_p=0.95)
    seeds = [11, 12, 13, 14, 15, 16]
    together = generate(model, prompts, sampling, seeds)
    assert together == generate(model, prompts, sampling, seeds)
    assert together[::-1] == generate(model, prompts[::-1], sampling, seeds[::-1])
    for i in (0, 3, 5):
        assert generate(model, [prompts[i]], sampling, [seeds[i]]) == [together[i]]
    twice = generate(model, [prompts[1], prompts[1]], sampling)
    assert twice[0] == twice[1] != generate(model, [prompts[1]], sampling, [1])[0]


def test_stops_end_one_sequence_and_leave_the_others() -> None:
    model, prompts = random_decoder(), prompts_of(*PROMPTS)
    free = generate(model, prompts, Sampling(max_new_tokens=60))
    stops = (free[1][20], free[4][0])
    expected = []
    for text in free:
        end = next((i for i, token in enumerate(text) if token in stops), len(text))
        expected.append(text[:end])
    assert sorted({len(text) for text in expected})[0] == 0
    assert len({len(text) for text in expected}) > 2
    assert generate(model, prompts, Sampling(max_new_tokens=60, stop_tokens=stops)) == expected


def test_tokens_stream_in_rounds() -> None:
    model, prompts = random_decoder(), prompts_of(3, 70)
    pairs = stream(model, prompts, Sampling(max_new_tokens=100_000))
    first = [next(pairs) for _ in range(6)]  # at once, or this would take minutes
    assert [number for number, _ in first] == [0, 1] * 3
    text = generate(model, prompts, Sampling(max_new_tokens=3))
    assert first == [(number, text[number][i]) for i in range(3) for number in range(2)]


def test_a_sequence_ends_at_the_models_reach() -> None:
    model = random_decoder(max_tokens=70)
    out = generate(model, prompts_of(1, 66, 70), Sampling(max_new_tokens=68))
    assert [len(text) for text in out] == [68, 4, 0]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**settings)


def test_prompts_that_cannot_be() -> None:
    model = random_decoder(max_tokens=70)
    for prompts, said in (
        ([], "no prompt"),
        ([[5], []], "prompt 1 has 0 tokens"),
        ([[5] * 71], "has 71 tokens; the model reads 1 to 70"),
        ([[5, 300]], "not among the model's 300"),
    ):
        with pytest.raises(InputError, match=said):
            stream(model, prompts, Sampling())
    with pytest.raises(InputError, match="2 prompts have 1 seeds"):
        stream(model, [[5], [6]], Sampling(), [1])
