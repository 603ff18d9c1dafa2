"""Ray's own autoscaler beside a run that asks for more than there is: machines come, and go when it is over.

As on Kubernetes, every machine has the code already: the raylets share a folder for what jobs are sent, which would be
unpacked again under those that run.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Elastic

from cluster.checkout import list_files
from jobs.commands import ROOT

pytestmark = pytest.mark.slow

DOCUMENTS = 300


@pytest.fixture
def image(tmp_path) -> Path:
    """The packages alone, as an image has them."""
    for file in list_files(ROOT, ["models", "*.toml"]):
        (tmp_path / "image" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "image" / file)
    return tmp_path / "image"


@pytest.fixture
def elastic(image) -> Iterator[Elastic]:
    cluster = Elastic({"CPU": 3}, most=2, PYTHONPATH=str(image))
    yield cluster
    cluster.stop()


def test_a_cluster_that_starts_empty_grows_for_a_run_and_shrinks_after(elastic, image, tmp_path, tiny_model_folder):
    (tmp_path / "source").mkdir()
    with (tmp_path / "source" / "documents.jsonl").open("w") as out:
        for number in range(DOCUMENTS):
            print(
                json.dumps({"id": f"{number}", "text": f"Document {number}. " + "The night is long. " * 400}), file=out
            )
    assert elastic.num_machines() == 0
    seen: set[int] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            seen.add(elastic.num_machines())

    threading.Thread(target=look, daemon=True).start()
    table = tmp_path / "table.lance"
    command = ["embed", tmp_path / "source", table, "--model", tiny_model_folder, "--json"]
    sets = ["--set", "compute.block_chars=20000", "--set", "vectors.dtype=float32", "--set", "compute.actors=1:2"]
    sets += ["--set", "gates.off=collapse"]  # the texts are much alike
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, command), *sets],
        cwd=tmp_path,
        env=os.environ | {"NIGHTLOOM_ADDRESS": elastic.address, "PYTHONPATH": str(image)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["embedded"] == DOCUMENTS
    until = time.monotonic() + 180
    while elastic.num_machines():
        assert time.monotonic() < until, "machines stay though nothing runs"
        time.sleep(1)
    over.set()
    assert {0, 1, 2} >= seen >= {0, 2}, seen
