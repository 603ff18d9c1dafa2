"""How fast does a CPU generate, beside Hugging Face's `generate`, from the same weights?

One process, float32, random weights of an Ettin size, greedy; peers interleaved round by round, medians. Tokens per
second counts new tokens over the whole call, reading the prompts included. The tokens must be the same.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.setting import HOME, environment, keep, say
from model.cache import cache_bytes
from model.config import preset
from model.decoder import CausalLanguageModel, Decoder
from model.encoder import init_weights
from model.generation import Sampling, generate

WORKLOADS = {
    "one prompt": (64,),
    "eight uneven prompts": (4, 16, 63, 64, 65, 130, 260, 500),
}


def hugging_face(model: CausalLanguageModel) -> Any:
    import transformers

    config = model.model.config
    theirs = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**config.to_hf()))
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def theirs_generate(theirs: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """One batch, padded on the left."""
    longest, pad_id = max(map(len, prompts)), theirs.config.pad_token_id
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=pad_id)
    return out[:, longest:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="ettin-32m")
    parser.add_argument("--steps", type=int, default=64, help="new tokens of every prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    # At the published deviation of 0.02 the output is nearly the same for any input, and so are the tokens.
    config = preset(options.preset, causal=True, initializer_range=0.1)
    model = CausalLanguageModel(Decoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    theirs = hugging_face(model)
    record: dict[str, Any] = {"benchmark": "generate", "preset": options.preset, "environment": environment()}
    record |= {"dtype": "float32", "new_tokens": options.steps, "workloads": {}}
    rng, sampling = np.random.default_rng(0), Sampling(max_new_tokens=options.steps)
    print("| | nightloom, tokens/s | Hugging Face, tokens/s | ratio | cache, kB |\n|---|---:|---:|---:|---:|")
    for name, lengths in WORKLOADS.items():
        prompts = [rng.integers(100, 50_000, length).tolist() for length in lengths]
        ways = {
            "nightloom": lambda prompts=prompts: generate(model, prompts, sampling),
            "huggingface": lambda prompts=prompts: theirs_generate(theirs, prompts, options.steps),
        }
        ours, expected = (way() for way in ways.values())  # the check, and the warm-up
        if ours != expected:
            raise RuntimeError(f"{name}: the tokens differ; no speed of a wrong result is reported")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(options.rounds):
            for way, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[way].append(round(time.perf_counter() - started, 3))
            say(f"{name}, round {number + 1}: " + ", ".join(f"{way} {seconds[way][-1]} s" for way in ways))
        total = len(lengths) * options.steps
        speeds = {way: round(total / statistics.median(values), 1) for way, values in seconds.items()}
        size = cache_bytes(config, lengths, options.steps - 1, torch.float32)
        record["workloads"][name] = {
            "prompts": lengths,
            "different_tokens": len({token for text in ours for token in text}),
            "tokens_per_s": speeds,
            "ratio": round(speeds["nightloom"] / speeds["huggingface"], 2),
            "seconds": seconds,
            "cache_bytes": size,
        }
        print(
            f"| {name} | {speeds['nightloom']} | {speeds['huggingface']} | {record['workloads'][name]['ratio']} | "
            f"{size / 1000:,.0f} |"
        )
    say(f"kept in {keep(record, options.out)}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
