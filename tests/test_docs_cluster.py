"""The newcomer's path in docs/cluster.md: every `sh` block, run as it is written, in one shell."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jobs.cli import make_parser
from jobs.commands import ROOT

TEXT = (ROOT / "docs" / "cluster.md").read_text()


def blocks(kind: str) -> list[str]:
    """What stands between fences that open with ```kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == kind]


@pytest.mark.slow
def test_the_path_on_one_machine_is_walked_as_it_is_written():
    folder = Path(tempfile.mkdtemp(prefix="nl", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["RAY_TMPDIR"] = str(folder)  # whatever else runs on this machine is left alone
    shell = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", "".join(blocks("sh"))],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = shell.communicate(timeout=580)
        assert shell.returncode == 0, err[-3000:]
        assert "2 documents embedded into /tmp/nightloom-newcomer/notes.lance" in out
        assert re.search(r"embed-notes-[0-9a-f]{6}-\d{4}-\d\d-\d\d +succeeded", out)
        assert "spot" in out
        assert "The night is done" in out
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree("/tmp/nightloom-newcomer", ignore_errors=True)


def test_commands_that_need_a_cloud_parse_at_least():
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    commands = [line.partition("nightloom submit ")[2].split() for line in lines if "nightloom submit " in line]
    assert len(commands) >= 3
    for words in commands:
        options = make_parser().parse_args(["submit", *words])
        if options.words[1] != "nightly" or "nightly" in make_parser().format_help():
            make_parser().parse_args(options.words[1:])


def test_files_that_it_names_are_there():
    for name in re.findall(r"cluster/[\w./-]+\.(?:yaml|json)|cluster/Dockerfile", TEXT):
        assert (ROOT / name).exists(), name
