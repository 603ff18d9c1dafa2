"""A command as a job on a real cluster of two machines, through the job server's HTTP address, from a clean folder."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
from clusters import Machines

from cluster.checkout import list_files
from jobs.commands import ROOT
from jobs.submit import (
    Command,
    check_versions,
    job_name,
    pinned_requirements,
    pinned_versions,
    read_command,
    read_variables,
)
from model.errors import InputError

FILES = list_files(ROOT)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    two = Machines({"num_cpus": 1}, {"num_cpus": 3})
    yield two
    two.stop()


@pytest.fixture
def run(machines, tmp_path):
    """Runs `nightloom` in an empty folder; what is imported is the checkout that this test is part of."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"RAY_API_SERVER_ADDRESS": machines.url, "PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def refuse(words: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        read_command(words, FILES)
    assert "\n" not in str(refused.value)


def test_a_job_embeds_and_its_log_report_and_status_come_back(run, tmp_path, tiny_model_folder):
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / f"{number}.txt").write_text(f"Text {number}. A night is long.")
    table = tmp_path / "table.lance"
    (tmp_path / "run.toml").write_text("[vectors]\ndtype = 'float32'\n")
    embed = ("embed", tmp_path / "source", table, "--model", tiny_model_folder, "--config", "run.toml", "--json")
    done = run("submit", "--", *embed)
    assert done.returncode == 0, done.stderr
    assert '"embedded": 3' in done.stdout
    assert "Running entrypoint for job embed-table-" in done.stderr
    assert (table / "_runs").exists()
    # The same night again is a job of its own, which finds nothing to do; what is wrong comes back as status 2.
    again = run("submit", "--", *embed[:-1])
    assert "Nothing to embed" in again.stdout, again.stderr
    wrong = run("submit", "--", "embed", tmp_path / "nothing", table)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "does not exist" in wrong.stderr
    listed = run("jobs").stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["succeeded", "succeeded", "failed"]
    assert [line.split()[0].rpartition("-")[2] for line in listed][1:] == ["2", "3"]


SLOW_TEXT = "A night is long and full of documents. " * 60


def slow_command(folder: Path, model: Path) -> list[str]:
    """Embeds for some ten seconds or more."""
    (folder / "many").mkdir()
    lines = (json.dumps({"id": f"{n}", "text": f"{n} {SLOW_TEXT}"}) for n in range(800))
    (folder / "many" / "a.jsonl").write_text("\n".join(lines))
    words = ["embed", str(folder / "many"), str(folder / "many.lance"), "--model", str(model), "-v"]
    return [
        *words,
        "--set",
        "compute.block_chars=20000",
        "--set",
        "compute.commit_every_s=0",
        "--set",
        "gates.off=collapse",
    ]


def wait_until_running(run) -> None:
    """Until the newest job does."""
    until = time.monotonic() + 240
    while "running" not in (run("jobs", "--last", 1).stdout or ""):
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.mark.slow
def test_a_job_is_detached_found_running_attached_and_stopped(run, tmp_path, tiny_model_folder):
    command = slow_command(tmp_path, tiny_model_folder)
    detached = run("submit", "--detach", "--json", "--", *command)
    (job,) = [one["id"] for one in json.loads(detached.stdout)["jobs"]]
    second = run("submit", "--", *command)
    assert second.returncode == 2
    assert f"{job} runs already" in second.stderr
    attached = run("submit", "--attach", "--", *command)
    assert attached.returncode == 0, attached.stderr
    assert "800 documents embedded" in attached.stdout
    again = run("attach", job)
    assert again.stdout == attached.stdout
    assert "had ended before" in run("stop", job).stdout

    (tmp_path / "many" / "b.jsonl").write_text(
        (tmp_path / "many" / "a.jsonl").read_text().replace('"id": "', '"id": "b')
    )
    (job,) = [one["id"] for one in json.loads(run("submit", "--detach", "--json", "--", *command).stdout)["jobs"]]
    follower = threading.Thread(target=lambda: found.append(run("attach", job)))
    found: list[subprocess.CompletedProcess[str]] = []
    follower.start()
    wait_until_running(run)
    assert "is told to stop" in run("stop", job).stdout
    follower.join(timeout=120)
    assert found[0].returncode == 130
    assert found[0].stderr.splitlines()[-1] == f"nightloom: {job} was stopped"
    ended = run("submit", "--", *command)  # nothing has to be cleared by hand
    assert ended.returncode == 0, ended.stderr


class Wire(threading.Thread):
    """Passes connections on to a server; `cut` breaks all there are and takes no new ones for a while."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.there = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.open: list[socket.socket] = []
        self.down_until = 0.0
        self.cuts = 0

    def run(self) -> None:
        while True:
            here, _ = self.server.accept()
            if time.monotonic() < self.down_until:
                here.close()
                continue
            there = socket.create_connection(self.there)
            self.open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self.copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(65536):
                sink.sendall(data)

    def cut(self, seconds: float) -> None:
        self.cuts += 1
        self.down_until = time.monotonic() + seconds
        for one in self.open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open = []


@pytest.mark.slow
def test_a_lost_connection_is_made_again_and_nothing_is_said_twice(run, machines, tmp_path, tiny_model_folder):
    wire = Wire(machines.url)
    wire.start()
    found: list[subprocess.CompletedProcess[str]] = []
    command = slow_command(tmp_path, tiny_model_folder)
    follower = threading.Thread(
        target=lambda: found.append(run("submit", "--", *command, RAY_API_SERVER_ADDRESS=wire.url))
    )
    follower.start()
    wait_until_running(run)
    while follower.is_alive():
        wire.cut(2)
        follower.join(timeout=6)
    assert found[0].returncode == 0, found[0].stderr
    assert "800 documents embedded" in found[0].stdout
    versions = re.findall(r"version (\d+): ", found[0].stderr)
    assert len(versions) > 2
    assert len(versions) == len(set(versions)), found[0].stderr
    assert "was lost" in found[0].stderr
    assert wire.cuts > 1


@pytest.mark.slow
def test_a_training_is_a_job_too(run, text_shards, tmp_path):
    from test_jobs_pretrain import write_config

    config = write_config(text_shards, tmp_path)
    done = run("submit", "--", "pretrain", config.name, "--set", "keep.checkpoint_every=20", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert (report["job"], report["status"], report["steps"]) == ("pretrain", "done", 60)
    assert (tmp_path / "run" / "model" / "config.json").exists()
    again = run("submit", "--", "pretrain", config.name)
    assert again.stdout.startswith("Nothing to train"), again.stderr


@pytest.mark.slow
def test_a_cluster_with_a_token_lets_in_who_has_it(run, tmp_path):
    token = "a" * 32
    (tmp_path / "token").write_text(token)
    guarded = Machines({"num_cpus": 1}, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    try:
        words = ("submit", "--", "runs", str(tmp_path / "nothing.lance"))
        closed = {"RAY_API_SERVER_ADDRESS": guarded.url, "HOME": str(tmp_path)}
        refused = run(*words, **closed)
        assert refused.returncode == 2
        assert "wants a token" in refused.stderr, refused.stderr
        opened = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        let_in = run(*words, **closed, **opened)
        assert "there is no table" in let_in.stderr, let_in.stderr
        assert token not in let_in.stderr + let_in.stdout + refused.stderr
        # As Ray leaves it in the home of who has ever started it.
        (tmp_path / "home" / ".ray").mkdir(parents=True)
        (tmp_path / "home" / ".ray" / "auth_token").write_text(token)
        let_in = run(*words, **closed | {"HOME": str(tmp_path / "home")})
        assert "there is no table" in let_in.stderr, let_in.stderr
    finally:
        guarded.stop()


def test_words_are_read_by_the_parser_that_the_job_will_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse([], "needs a command")
    refuse(["embed"], "required: SOURCE, TABLE")
    refuse(["submit", "--", "embed"], "for this machine")
    refuse(["embed", "s3://a/b", "here.lance"], "table 'here.lance' is a path on this machine")
    refuse(["embed", "corpus", "s3://a/t"], "source 'corpus' is a path on this machine")
    refuse(["embed", "../../etc", "s3://a/t"], "source '../../etc' is a path on this machine")
    refuse(["embed", "s3://a/b", "s3://a/t", "--config", "none.toml"], "no configuration file none.toml")
    (tmp_path / "train.toml").write_text('tokens = "s3://a/shards"\noutput = "s3://a/run"\n')
    command = read_command(["pretrain", "train.toml", "--set", "output=s3://b/other"], FILES)
    assert command.words == ["pretrain", "submitted/train.toml", "--set", "output=s3://b/other"]
    assert command.place == "s3://b/other"
    assert set(command.files) == {"submitted/train.toml"}
    night = '[tables.t]\nsource = "s3://a/b"\nmodel = "s3://a/m"\ntable = '
    (tmp_path / "nightly.toml").write_text(night + '"s3://a/t.lance"\n')
    assert read_command(["nightly", "nightly.toml"], FILES).place == "s3://a/t.lance"
    (tmp_path / "nightly.toml").write_text(night + '"../t.lance"\n')
    refuse(["nightly", "nightly.toml"], "table '../t.lance' is a path on this machine")
    (tmp_path / "train.toml").write_text('tokens = "shards"\noutput = "s3://a/run"\n')
    refuse(["pretrain", "train.toml"], "tokens 'shards' is a path on this machine")
    (tmp_path / "train.toml").write_text(
        '[tables.a]\nsource = "s3://a/b"\ntable = "s3://a/t"\n[tables.b]\ntable = "/t"\n'
    )
    assert read_command(["pretrain", "train.toml"], FILES).place == "s3://a/t /t"
    (tmp_path / "train.toml").write_text('[tables.a]\nsource = "s3://a/b"\ntable = "here.lance"\n')
    refuse(["pretrain", "train.toml"], "table 'here.lance' is a path on this machine")


def test_what_is_in_the_checkout_goes_by_its_place_in_it(monkeypatch):
    monkeypatch.chdir(ROOT / "models")
    command = read_command(["embed", "s3://a/b", "s3://a/t", "--model=nightloom-small"], FILES)
    assert command.words[-1] == "--model=models/nightloom-small"
    assert read_command(["embed", "s3://a/b", "s3://a/t", "--model", "some/hub-id"], FILES).words[-1] == "some/hub-id"


def test_a_name_says_what_and_which_night():
    name = job_name(Command([], "embed", "s3://tables/my corpus.lance"), datetime(2026, 11, 28, 2, 0))
    assert name.startswith("embed-my-corpus-")
    assert name.endswith("-2026-11-27")
    assert name == job_name(Command([], "embed", "s3://tables/my corpus.lance"), datetime(2026, 11, 27, 23, 0))
    assert name != job_name(Command([], "embed", "s3://tables/my corpus.lance"), datetime(2026, 11, 28, 13, 0))
    assert name != job_name(Command([], "embed", "s3://other/my corpus.lance"), datetime(2026, 11, 28, 2, 0))
    assert job_name(Command(["runs"], "runs"), datetime(2026, 11, 28, 2, 0)).startswith("runs-")


def test_variables_hold_no_secrets():
    assert read_variables(["AWS_REGION=eu-west-1", "A=b=c"]) == {"AWS_REGION": "eu-west-1", "A": "b=c"}
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "my_password", "AWS_ACCESS_KEY_ID"):
        with pytest.raises(InputError, match="the dashboard shows") as refused:
            read_variables([f"{name}=geheim"])
        assert "geheim" not in str(refused.value)
    with pytest.raises(InputError, match="write --env NAME=VALUE"):
        read_variables(["NAME"])


def test_the_versions_of_the_checkout_are_pinned():
    pins = pinned_versions()
    assert {"torch", "ray", "pyarrow", "pylance"} <= set(pins)
    assert "pytest" not in pins
    assert f"ray[data,train]=={pins['ray']}" in pinned_requirements(pins)
    check_versions(f"ray=={pins['ray']} torch=={pins['torch']}")
    with pytest.raises(InputError, match=r"pyarrow [\d.]+ for 1\.0, nothing-of-the-kind none for 2"):
        check_versions(f"ray=={pins['ray']} pyarrow==1.0 nothing-of-the-kind==2")


def test_a_checkout_that_is_too_large_is_refused_before_anything_is_sent(run, tmp_path, monkeypatch):
    """In a copy of the checkout, because this one stays as it is."""
    import shutil

    for file in FILES:
        if not file.parts[0].startswith("models"):
            (tmp_path / "copy" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / "copy" / file)
    with (tmp_path / "copy" / "ballast.bin").open("wb") as ballast:
        ballast.truncate(300_000_000)
    words = ("submit", "--", "runs", "s3://a/t")
    refused = run(*words, PYTHONPATH=str(tmp_path / "copy"), RAY_API_SERVER_ADDRESS="http://127.0.0.1:1")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "ballast.bin 300 MB" in refused.stderr
    sent = run("submit", "--exclude", "ballast.bin", *words[1:], PYTHONPATH=str(tmp_path / "copy"))
    assert "ballast" not in sent.stderr
