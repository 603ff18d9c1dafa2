"""`nightloom generate` as a user meets it: text as it comes, a JSON line, one clear line for what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from test_jobs_cli import nightloom, refused
from test_model_decoder import random_decoder

from jobs.generate import prompt_tokens, run_generate, stop_tokens
from model.errors import InputError
from model.folder import load_tokenizer, read_folder
from model.generation import Sampling, generate
from model.weights import load_decoder, save_folder

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    model = random_decoder(vocab_size=400, cls_id=2, sep_id=3, max_tokens=200)
    return save_folder(model, tmp_path_factory.mktemp("model") / "decoder", tokenizer_from=tiny_tokenizer_folder)


def test_text_is_the_models_and_comes_in_pieces(folder: Path) -> None:
    pieces: list[str] = []
    report = run_generate(str(folder), PROMPT, show=pieces.append, max_new_tokens=30, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(PROMPT).ids
    assert (ids[0], ids[-1]) == (2, 3)
    model = load_decoder(read_folder(folder, causal=True)).eval()
    (expected,) = generate(model, [ids[:-1]], Sampling(max_new_tokens=30, stop_tokens=(3,)))
    assert report.tokens == expected
    assert report.prompt_tokens == len(ids) - 1
    assert report.text == tokenizer.decode(expected)
    assert len(pieces) > 5
    assert report.text.startswith("".join(pieces))  # a last character may lack its last token
    assert report.summary() == ""


def test_sampling_in_the_machines_own_type(folder: Path) -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    first, again, other = (run_generate(str(folder), PROMPT, seed=seed, **settings) for seed in (1, 1, 2))
    assert first.tokens == again.tokens != other.tokens
    assert first.summary() == first.text
    assert hasattr(torch, first.dtype)


def test_command_streams_or_prints_one_json_line(folder: Path) -> None:
    arguments = ("generate", folder, PROMPT, "--max-new-tokens", 12, "--temperature", 0.8, "--top-k", 30, "--seed", 5)
    told = nightloom(*arguments, "--top-p", 0.9, "--json")
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    assert told.stdout.count("\n") == 1
    assert len(report["tokens"]) == 12
    shown = nightloom(*arguments, "--top-p", 0.9)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert report["text"].startswith(shown.stdout.rstrip("\n"))
    assert shown.stdout.endswith("\n")


def test_what_is_wrong_is_one_line_and_status_2(folder: Path, tiny_model_folder: Path) -> None:
    refused("generate", tiny_model_folder, PROMPT, says="holds an encoder (ModernBertModel); give the folder of a deco")
    refused("generate", folder, PROMPT, "--top-p", 2, says="top_p is 2.0; it is above 0 and at most 1")
    refused("embed", tiny_model_folder, folder / "t.lance", "--model", folder, says="holds a decoder (ModernBertDec")
    with pytest.raises(InputError, match="the prompt is empty"):
        run_generate(str(folder), "")
    with pytest.raises(InputError, match="the model reads 1 to 200"):
        run_generate(str(folder), "word " * 300)


def test_the_closing_token_is_left_out_and_stops(folder: Path) -> None:
    assert prompt_tokens([2, 7, 3, 8, 3], (3,)) == [2, 7, 3, 8]
    config = json.loads((folder / "config.json").read_text())
    for named, expected in ((None, (3,)), (9, (3, 9)), ([9, 11], (3, 9, 11))):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": named}))
        assert stop_tokens(read_folder(folder, causal=True)) == expected
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    for named, expected in ((None, (3, 9)), (7, (3, 7, 9)), ([9, 11], (3, 9, 11))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_tokens(read_folder(folder, causal=True)) == expected
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
