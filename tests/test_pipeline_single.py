"""The single process: the rows that Ray's workers would have written, and an end in every case."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from strikes import wait_until
from test_pipeline_table import RECIPE
from test_pipeline_workers import (
    FAILS,
    KILLS_ENCODER,
    KILLS_READER,
    LengthEncoder,
    WordCounter,
    job_of,
    plan_of,
    stages_by_value,  # noqa: F401 (a fixture)
)

from model.errors import InputError
from pipeline.apply import Applied, apply
from pipeline.dead import DeadLetters, list_letters
from pipeline.single import ProcessDied, SingleProcess
from pipeline.survey import Plan
from pipeline.table import EmbeddingTable
from pipeline.work import Limit
from pipeline.workers import Job


class SlowEncoder(LengthEncoder):
    """One that would take a minute for every table."""

    def embed(self, tokens: pa.Table) -> Iterator[object]:
        Path(self.log).write_text(str(os.getpid()))
        time.sleep(60)
        return super().embed(tokens)


class NoTokenizer(WordCounter):
    def __init__(self, job: Job) -> None:
        raise InputError("tokenizer.json is gone")


def made(folder: Path, texts: list[str], **changes: object) -> tuple[EmbeddingTable, Plan, Job]:
    table = EmbeddingTable.create(str(folder / "table.lance"), RECIPE, model="m")
    return table, plan_of(folder, texts, table, 40), replace(job_of(table.uri, folder / "log", 40), **changes)


def embed(table: EmbeddingTable, plan: Plan, job: Job, **options: object) -> Applied:
    letters = DeadLetters(table)
    with SingleProcess() as single:
        return apply(
            job, plan, table, plan.removals, letters=letters, single=single, advance=lambda *_: None, **options
        )


def lengths(table: EmbeddingTable) -> dict[str, float]:
    rows = table.dataset.to_table(columns=["document_id", "vector"]).to_pylist()
    found = {row["document_id"]: row["vector"][0] for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_document_is_embedded_or_dead_without_ray(tmp_path):
    texts = [f"text {'x' * i}" for i in range(30)]
    texts[7] = FAILS
    table, plan, job = made(tmp_path, texts)
    assert len(plan.work) > 3
    applied = embed(table, plan, job)
    assert lengths(table) == {f"d{i:02}": len(text) for i, text in enumerate(texts) if i != 7}
    assert (applied.documents, applied.missing, applied.wasted_tokens) == (29, 1, 0)
    assert [row["document_id"] for row in list_letters(table)] == ["d07"]


@pytest.mark.usefixtures("stages_by_value")
@pytest.mark.parametrize("text", [KILLS_ENCODER, KILLS_READER])
def test_what_kills_the_process_goes_to_ray_with_what_is_left(tmp_path, text):
    """Ray's workers find the document that does it; what had come before is not embedded again."""
    texts = [f"text {i:02}" for i in range(20)]
    texts[11] = text
    table, plan, job = made(tmp_path, texts)
    before: list[int] = []

    def workers():
        before.append(len(lengths(table)))
        return job.workers

    applied = embed(table, plan, job, workers=workers)
    assert lengths(table) == {f"d{i:02}": 7 for i in range(20) if i != 11}
    assert 0 < before[0] < 12
    assert (applied.documents, applied.missing) == (19, 1)
    assert [(row["document_id"], row["stage"]) for row in list_letters(table)] == [("d11", "quarantine")]


def test_without_workers_its_death_is_an_error_and_what_came_is_kept(tmp_path):
    table, plan, job = made(tmp_path, [*(f"text {i:02}" for i in range(20)), KILLS_ENCODER])
    with pytest.raises(ProcessDied):
        embed(table, plan, job)
    assert 0 < len(lengths(table)) < 21


def test_wrong_input_that_it_finds_is_said(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json is gone"):
        embed(*made(tmp_path, ["text"], tokenizer=NoTokenizer))


def test_a_limit_ends_the_work(tmp_path):
    table, plan, job = made(tmp_path, [f"text {i:02}" for i in range(30)])
    applied = embed(table, plan, job, limit=Limit(tokens=4))
    assert 4 <= applied.documents < 30
    assert applied.left == 30 - applied.documents
    assert applied.stopped


def test_the_block_ends_while_it_works(tmp_path):
    _, plan, job = made(tmp_path, ["text"], encoder=SlowEncoder)
    with SingleProcess() as single:
        rows = single.fragments(job, plan.work)

        def draw() -> None:
            with pytest.raises(ProcessDied):
                next(rows)

        thread = threading.Thread(target=draw)
        thread.start()
        assert wait_until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text() != "", 30)
        began = time.monotonic()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - began < 10


def test_it_does_not_outlive_its_parent(tmp_path):
    """SIGKILL to the driver, which then cannot end anything itself."""
    (tmp_path / "driver.py").write_text(
        "import time\n"
        "from pipeline.single import SingleProcess\n"
        "if __name__ == '__main__':\n"
        "    single = SingleProcess()\n"
        "    single.start()\n"
        "    print(single.pid.result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parent.parent
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert driver.stdout
    pid = int(driver.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 20)


def test_a_device_that_is_not_there(tmp_path):
    import torch

    with SingleProcess() as single:
        assert single.device("cpu").name == "cpu"
        if not torch.cuda.is_available():
            assert single.device("auto").name == "cpu"
            with pytest.raises(InputError, match=r"compute\.device is cuda"):
                single.device("cuda")
