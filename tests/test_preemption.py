"""Machines that go away in the middle of an embedding run: killed, or drained with some seconds' notice.

A head and three raylets with resources of their own, one embedding actor on each; the run is a submitted job. Its table
must be that of a run that nothing happened to, and its report must say what was lost.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow.parquet as pq
import pytest
from clusters import Machines

from cluster.spot import Notice, drain
from jobs.commands import ROOT

pytestmark = pytest.mark.slow

DOCUMENTS, CHARS = 72, 4_000
SETS = ("vectors.dtype=float32", "compute.block_chars=8000", "compute.commit_every_s=0")


@pytest.fixture
def machines() -> Iterator[Machines]:
    worker = {"num_cpus": 3, "object_store_memory": 200_000_000}
    head = {"num_cpus": 1, "object_store_memory": 200_000_000}
    four = Machines(head, *(worker | {"resources": {f"rack-{number}": 1}} for number in range(3)))
    yield four
    four.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    documents = pq.read_table(ROOT / "corpus" / "documents.parquet", columns=["id", "text"])
    with (folder / "documents.jsonl").open("w") as out:
        for row in documents.slice(0, DOCUMENTS).to_pylist():
            print(json.dumps({"id": row["id"], "text": row["text"][:CHARS]}), file=out)
    return folder


def submit(machines: Machines, source: Path, table: Path) -> subprocess.Popen[str]:
    command = ["embed", str(source), str(table), "--json", *(word for one in SETS for word in ("--set", one))]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "submit", "--", *command],
        cwd=ROOT,
        env=os.environ | {"RAY_API_SERVER_ADDRESS": machines.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(job: subprocess.Popen[str]) -> dict:
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err[-3000:]
    return json.loads(out)


def wait_for_fragments(table: Path, number: int) -> None:
    until = time.monotonic() + 300
    while len(list(table.glob("data/*.lance"))) < number:
        assert time.monotonic() < until, "nothing was written"
        time.sleep(0.1)


def vectors(table: Path) -> dict[str, np.ndarray]:
    rows = lance.dataset(str(table), version="published").to_table(columns=["document_id", "vector"])
    found = dict(zip(rows["document_id"].to_pylist(), rows["vector"].to_pylist(), strict=True))
    assert len(found) == len(rows) == DOCUMENTS
    return {name: np.array(vector) for name, vector in found.items()}


@pytest.mark.parametrize("how", ["killed", "drained"])
def test_the_table_is_that_of_an_undisturbed_run(machines, source, tmp_path, how):
    undisturbed = end(submit(machines, source, tmp_path / "undisturbed.lance"))
    assert undisturbed["wasted_tokens"] == 0
    table = tmp_path / "disturbed.lance"
    job = submit(machines, source, table)
    wait_for_fragments(table, 6)
    node = machines.nodes[1]
    if how == "killed":
        machines.kill(node)
    else:
        drain(machines.address, node, Notice(time.time() + 15, "a test"))
    report = end(job)
    assert report["embedded"] == DOCUMENTS
    assert report["status"] == "published"
    share = report["wasted_tokens"] / (report["tokens"] + report["wasted_tokens"])
    print(f"{how}: {report['wasted_tokens']} tokens wasted, {share:.1%}, {report['seconds']} s")
    # A machine that dies takes what is in flight with it; one that is drained finishes it, or hands it back unbegun.
    assert share < 0.2 if how == "killed" else share == 0
    before, after = vectors(tmp_path / "undisturbed.lance"), vectors(table)
    assert before.keys() == after.keys()
    assert max(np.abs(before[name] - after[name]).max() for name in before) < 1e-5
