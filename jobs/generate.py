"""`nightloom generate`: a decoder goes on from a prompt, and its text appears as it comes.

The prompt gets the special tokens that the model's tokenizer puts before a text, and not the closing one: that would
tell the model that the text is over. Generation stops at that token too.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from model.errors import InputError
from model.folder import ModelFolder, check_tokenizer, load_tokenizer, read_folder, read_json


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """One text that a model wrote."""

    job: str
    status: str
    model: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: list[int]
    seconds: float
    dtype: str
    shown: bool
    """Whether the text was written out already while it came."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        return "" if self.shown else self.text


def run_generate(
    model: str,
    prompt: str,
    *,
    show: Callable[[str], Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **settings: Any,
) -> GenerateReport:
    """Go on from a prompt.

    Args:
        model: folder (s3:// too) or hub id of a decoder.
        show: gets every piece of text as it comes.
        settings: for `model.generation.Sampling`.

    Raises:
        InputError: no decoder there, an empty or too long prompt, a setting out of range.
    """
    from pipeline.storage import local_model

    folder = read_folder(local_model(model), causal=True)
    tokenizer = load_tokenizer(folder.path)
    check_tokenizer(tokenizer, folder.config, folder.path)
    stops = stop_tokens(folder)
    tokens = prompt_tokens(tokenizer.encode(prompt).ids, stops)
    if not prompt or not tokens:
        raise InputError("the prompt is empty; give the beginning of a text")

    import torch
    from tokenizers.decoders import DecodeStream

    from model.embedder import choose_device, choose_dtype
    from model.generation import Sampling, stream
    from model.weights import load_decoder

    sampling = Sampling(stop_tokens=stops, **settings)
    place = choose_device(device)
    kind, _ = choose_dtype(dtype, place)
    language_model = load_decoder(folder, device=place, dtype=kind).to(place).eval().requires_grad_(False)
    for module in language_model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to(kind)  # norms stay as they were saved
    started, written = time.perf_counter(), []
    pieces = DecodeStream(skip_special_tokens=True)
    for _, token in stream(language_model, [tokens], sampling):
        written.append(token)
        piece = pieces.step(tokenizer, token)  # None within a character of several tokens
        if show is not None and piece:
            show(piece)
    return GenerateReport(
        job="generate",
        status="done",
        model=model,
        prompt=prompt,
        text=tokenizer.decode(written),
        prompt_tokens=len(tokens),
        tokens=written,
        seconds=round(time.perf_counter() - started, 3),
        dtype=str(kind).removeprefix("torch."),
        shown=show is not None,
    )


def stop_tokens(folder: ModelFolder) -> tuple[int, ...]:
    """What ends a text: `sep_token_id`, and `eos_token_id`, one or several, of config.json and generation_config.json,
    where Hugging Face looks first.
    """
    generation = read_json(folder.path / "generation_config.json", default={})
    stops = {folder.config.sep_id}
    for named in (folder.config.extra.get("eos_token_id"), generation.get("eos_token_id")):
        stops.update(named if isinstance(named, list) else [named])
    return tuple(sorted(token for token in stops if isinstance(token, int)))


def prompt_tokens(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Without the tokens that end a text: prompt_tokens([2, 7, 8, 3], (3,)) is [2, 7, 8]."""
    end = len(ids)
    while end and ids[end - 1] in stops:
        end -= 1
    return ids[:end]
