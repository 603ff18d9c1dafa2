"""The command line as a user meets it: in a process of its own, by exit status, stdout and stderr."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import commands
from jobs.cli import find_input_error, main
from jobs.commands import run_versions
from jobs.report import REPORT_KEYS
from model.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def nightloom(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def refused(*arguments: object, says: str, **environment: str) -> None:
    """The command ends with status 2, nothing on stdout, and one line on stderr that says so."""
    run = nightloom(*arguments, **environment)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("nightloom: ")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
    assert says in run.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder):
    """A corpus and the table that the command line made of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "corpus").mkdir()
    texts = {"fox": "The quick brown fox jumps over the lazy dog.", "night": "A crash at three in the night."}
    for name, text in texts.items():
        (folder / "corpus" / f"{name}.txt").write_text(text)
    command = ("embed", folder / "corpus", folder / "table.lance", "--json")
    return folder, nightloom(*command, NIGHTLOOM_MODEL=str(tiny_model_folder)), command


def test_first_run_prints_one_json_line_and_no_noise(made):
    _, run, _ = made
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    report = json.loads(run.stdout)
    assert run.stdout.count("\n") == 1
    assert tuple(report) == REPORT_KEYS
    assert (report["job"], report["status"], report["embedded"], report["read"]) == ("embed", "published", 2, 2)


def test_second_run_embeds_nothing_and_says_so(made, tiny_model_folder):
    _, _, command = made
    started = time.monotonic()
    run = nightloom(*command[:-1], "--model", tiny_model_folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Nothing to embed: all 2 documents")
    assert run.stderr == ""
    assert time.monotonic() - started < 30  # neither Ray nor torch was started


def test_plan_search_export(made, tiny_model_folder):
    folder, _, _ = made
    run = nightloom("plan", folder / "corpus", folder / "other.lance", "--model", tiny_model_folder, "--json")
    assert json.loads(run.stdout)["new"] == 2, run.stderr
    assert not (folder / "other.lance").exists()
    run = nightloom("search", folder / "table.lance", "The quick brown fox jumps over the lazy dog.", "-k", 1)
    assert run.returncode == 0, run.stderr
    assert "fox.txt" in run.stdout
    assert run.stderr == ""
    run = nightloom("export", folder / "table.lance", folder / "out.parquet", "--json")
    assert json.loads(run.stdout)["rows"] == 2, run.stderr


def test_help_is_quick_and_complete():
    best = min(timed_help() for _ in range(3))
    assert best < 0.5
    assert "chunking.granularity = document" in nightloom("embed", "--settings").stdout


def timed_help() -> float:
    started = time.monotonic()
    run = nightloom("--help")
    assert run.returncode == 0
    assert all(word in run.stdout for word in ("embed", "plan", "search", "export"))
    return time.monotonic() - started


def test_wrong_arguments():
    refused(says="COMMAND")
    refused("embed", says="SOURCE, TABLE")
    refused("embed", "a", "b", "--nonsense", says="--nonsense")
    refused("fly", says="invalid choice: 'fly'")


def test_wrong_sources(tmp_path, tiny_model_folder):
    rest = (tmp_path / "table.lance", "--model", tiny_model_folder)
    refused("embed", tmp_path / "missing", *rest, says="missing")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    refused("embed", tmp_path / "broken.parquet", *rest, says="broken.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "body.parquet")
    refused("embed", tmp_path / "body.parquet", *rest, says="text")
    refused("plan", tmp_path / "body.parquet", *rest, says="text")
    sets = ("--set", "columns.text=body", "--set", "columns.id=key")
    refused("embed", tmp_path / "body.parquet", *rest, *sets, says="key")
    assert not (tmp_path / "table.lance").exists()


def test_wrong_models(tmp_path, tiny_model_folder):
    (tmp_path / "a.txt").write_text("text")
    rest = ("embed", tmp_path / "a.txt", tmp_path / "table.lance")
    (tmp_path / "empty").mkdir()
    refused(*rest, "--model", tmp_path / "empty", says="config.json is missing")
    refused(*rest, NIGHTLOOM_MODEL=str(tmp_path / "nowhere"), says="nowhere")

    other = tmp_path / "bert"
    shutil.copytree(tiny_model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    refused(*rest, "--model", other, says="model_type 'bert'")

    unfit = tmp_path / "unfit"
    shutil.copytree(tiny_model_folder, unfit)
    (unfit / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    refused(*rest, "--model", unfit, says="the tokenizer has ids up to")
    assert not (tmp_path / "table.lance").exists()


def test_wrong_configuration(made, tmp_path, tiny_model_folder):
    folder, _, command = made
    rest = (*command, "--model", tiny_model_folder)
    refused(*rest, "--set", "chunk_tokns=3", says="the nearest is 'chunking.chunk_tokens'")
    (tmp_path / "run.toml").write_text("[chunking]\ngranularty = 'both'\n")
    refused(*rest, "--config", tmp_path / "run.toml", says="the nearest is 'chunking.granularity'")
    refused(*rest, "--set", "chunking.granularity=both", says="granularity: 'document' -> 'both'")
    refused(*rest, "--set", "vectors.prompt_name=haiku", says="has no prompt 'haiku'")
    refused("search", folder / "none.lance", "question", says="there is no table at")
    refused("search", folder / "table.lance", " ", says="the question is empty")
    refused("export", folder / "table.lance", folder, says="is a folder")
    refused("export", folder / "table.lance", "/proc/none/x.parquet", says="cannot be written")


def test_too_many_dead_end_with_status_3(tmp_path, tiny_model_folder):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "fine"}\nbroken\n')
    command = ("embed", tmp_path / "a.jsonl", tmp_path / "table.lance", "--model", tiny_model_folder, "--json")
    run = nightloom(*command, "--set", "max_dead=0")
    assert run.returncode == 3, run.stderr
    assert run.stderr.startswith("nightloom: not published: max_dead: 1 of 2 documents are dead, at most 0 may be")
    assert run.stderr.count("\n") == 1
    report = json.loads(run.stdout)
    assert (report["status"], report["published"], report["embedded"], report["dead"]) == ("unpublished", None, 1, 1)
    refused("search", tmp_path / "table.lance", "question", says="nothing is published")
    listed = nightloom("dead", tmp_path / "table.lance")
    assert "a.jsonl#1" in listed.stdout, listed.stderr
    assert json.loads(nightloom("dead", tmp_path / "table.lance", "--json").stdout)["stages"] == {"read": 1}


def test_input_errors_are_found_behind_what_ray_wraps():
    inner = InputError("a.txt is gone")

    class Wrapped(Exception):
        def __init__(self, cause):
            self.cause = cause

    outer = RuntimeError("task failed")
    outer.__cause__ = Wrapped(Wrapped(inner))
    assert find_input_error(outer) is inner
    assert find_input_error(RuntimeError("a fault")) is None


def test_what_a_library_prints_leaves_the_report_alone_on_stdout(made, monkeypatch, capfd):
    """Ray prints there that a machine was lost."""

    def noisy(options: argparse.Namespace) -> object:
        print("(raylet) Raylet is terminated.")
        return run_versions(options)

    monkeypatch.setattr(commands, "run_versions", noisy)
    assert main(["versions", str(made[0] / "table.lance"), "--json"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["job"] == "versions"
    assert "Raylet" in shown.err
