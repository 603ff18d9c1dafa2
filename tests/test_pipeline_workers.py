"""Workers on a real Ray: documents that kill their worker, in whichever stage, are set aside, nothing beside them."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE

from pipeline.apply import apply
from pipeline.chunks import ChunkingConfig
from pipeline.columns import DocumentColumns
from pipeline.dead import DeadLetters, list_letters
from pipeline.probes import document_table, from_bytes
from pipeline.quarantine import MOST_DEATHS_ALONE, QUARANTINED
from pipeline.storage import list_sources
from pipeline.survey import Options, Plan, Tasks, make_plan
from pipeline.table import EmbeddingTable
from pipeline.work import POSITION
from pipeline.workers import Departure, EmbedAndWrite, Job, Workers, letter, without_text

KILLS_READER, KILLS_ENCODER, LOSES_DEVICE = "kills the reader", "kills the encoder", "loses the device"
FAILS, LOG = "fails", "log"


@pytest.fixture
def stages_by_value(ray_session):
    """Workers cannot import this file: they get its classes themselves."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def died(log: str, text: str) -> None:
    """SIGKILL to this process, after a line that counts it."""
    with open(log, "a") as file:
        file.write(text + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


class AcceleratorError(RuntimeError):
    """Named like torch's, which is raised when a GPU is lost to a process."""


class WordCounter:
    """A tokenizer that works: a document's text goes on as it is. Some texts kill it."""

    def __init__(self, job: Job) -> None:
        self.log = job.embedding[LOG]

    def __call__(self, documents: pa.Table) -> pa.Table:
        texts = documents["text"].to_pylist()
        for text in texts:
            if text.startswith(KILLS_READER):
                died(self.log, text)
        return documents.append_column("num_chars", pa.array([len(text) for text in texts]))


class LengthEncoder:
    """An encoder that works: one vector a document, which holds its length. Some texts make it fail, some kill it.

    It looks like `EmbedStage`, without the seconds that importing torch takes in every new worker.
    """

    def __init__(self, job: Job) -> None:
        self.log = job.embedding[LOG]

    def embed(self, tokens: pa.Table) -> Iterator[SimpleNamespace]:
        texts, errors = tokens["text"].to_pylist(), tokens["error"].to_pylist()
        reasons = [
            error or ("it fails" if text.startswith(FAILS) else None) for text, error in zip(texts, errors, strict=True)
        ]
        for text, reason in zip(texts, reasons, strict=True):
            if text.startswith(KILLS_ENCODER) and not reason:
                died(self.log, text)
            if text.startswith(LOSES_DEVICE) and not reason:
                raise AcceleratorError(text)
        alive = np.array([reason is None for reason in reasons], bool)
        kept = tokens.filter(pa.array(alive))
        count = len(kept)
        vectors = np.array([[len(text), 1, 0, 0] for text in kept["text"].to_pylist()], np.float32).reshape(-1, 4)
        columns = {name: kept[name] for name in kept.column_names if name not in ("text", "error", "num_chars")}
        columns |= {name: pa.array([0] * count, pa.int64()) for name in ("char_start", "char_end")}
        columns |= {name: pa.array([0] * count, pa.int64()) for name in ("token_start", "token_end")}
        rows = pa.table(columns | {"chunk": pa.array([-1] * count, pa.int32())})
        dead = tokens.filter(pa.array(~alive)).select(["document_id", "text_hash", "source"])
        stages = ["tokens" if error else "embed" for error, reason in zip(errors, reasons, strict=True) if reason]
        dead = dead.append_column("stage", pa.array(stages, pa.string()))
        dead = dead.append_column("error", pa.array([reason for reason in reasons if reason], pa.string()))
        statistics = {"model_tokens": count, "padding_tokens": 0, "truncated_tokens": 0, "seconds": 0.0, "lengths": ()}
        yield SimpleNamespace(
            rows=rows.append_column("vector", pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)),
            dead=dead,
            statistics=SimpleNamespace(**statistics),
        )


def job_of(uri: str, log: Path, block_chars: int) -> Job:
    return Job(
        uri=uri,
        run="r1",
        columns=DocumentColumns(),
        chunking=ChunkingConfig(),
        prompt="",
        embedding={LOG: str(log), "model_path": ""},
        workers=Workers(actors=1, device="cpu", threads=1, tokens_per_batch=None, block_chars=block_chars),
        commit_every_s=0,
        tokenizer=WordCounter,
        encoder=LengthEncoder,
    )


def plan_of(folder: Path, texts: list[str], table: EmbeddingTable, block_chars: int) -> Plan:
    """To embed a corpus of these texts, d00 upward; `log` is there too."""
    (folder / "corpus").mkdir()
    (folder / "log").touch()
    lines = [json.dumps({"id": f"d{i:02}", "text": text}) for i, text in enumerate(texts)]
    (folder / "corpus" / "a.jsonl").write_text("\n".join(lines))
    files = list_sources(str(folder / "corpus"))
    return make_plan(
        files, DocumentColumns(), table.uri, table, Options(), Tasks(), least_chars=block_chars, keep=False
    )


def embed(folder: Path, texts: list[str], block_chars: int = 10_000) -> tuple[dict[str, float], dict, list[str], int]:
    """({id: length in its vector}, {id: letter}, what killed, documents missing) of a corpus that was embedded."""
    table = EmbeddingTable.create(str(folder / "table.lance"), RECIPE, model="m")
    plan = plan_of(folder, texts, table, block_chars)
    log = folder / "log"
    letters = DeadLetters(table)
    job = job_of(table.uri, log, block_chars)
    applied = apply(job, plan, table, plan.removals, letters=letters, advance=lambda *_: None)
    rows = table.dataset.to_table(columns=["document_id", "vector"]).to_pylist()
    found = {row["document_id"]: row["vector"][0] for row in rows}
    assert len(found) == len(rows) == applied.documents
    return found, {r["document_id"]: r for r in list_letters(table)}, log.read_text().splitlines(), applied.missing


@pytest.mark.usefixtures("stages_by_value")
def test_documents_that_kill_the_encoder_and_one_that_fails_in_one_block(tmp_path):
    texts = [f"text {'x' * i}" for i in range(12)]
    texts[3], texts[8], texts[9], texts[10] = KILLS_ENCODER, KILLS_ENCODER + " too", FAILS, LOSES_DEVICE
    found, letters, killed, missing = embed(tmp_path, texts)
    assert found == {f"d{i:02}": len(text) for i, text in enumerate(texts) if i not in (3, 8, 9, 10)}
    stages = {name: (row["stage"], row["attempts"]) for name, row in letters.items()}
    quarantined = dict.fromkeys(("d03", "d08", "d10"), ("quarantine", 2))
    assert stages == {**quarantined, "d09": ("embed", 1)}
    assert letters["d03"]["error"] == QUARANTINED
    assert missing == 4
    assert len(killed) == 2 * MOST_DEATHS_ALONE + 1


@pytest.mark.usefixtures("stages_by_value")
def test_the_only_document_kills_the_encoder(tmp_path):
    found, letters, killed, missing = embed(tmp_path, [KILLS_ENCODER])
    assert (found, missing) == ({}, 1)
    assert [row["stage"] for row in letters.values()] == ["quarantine"]
    assert len(killed) == MOST_DEATHS_ALONE + 1


@pytest.mark.usefixtures("stages_by_value")
def test_a_document_that_kills_the_tokenizer(tmp_path):
    texts = ["before", FAILS, KILLS_READER, "after"]
    found, letters, killed, missing = embed(tmp_path, texts)
    assert (found, missing) == ({"d00": 6, "d03": 5}, 2)
    stages = {name: (row["stage"], row["attempts"], row["error"]) for name, row in letters.items()}
    assert stages == {"d01": ("embed", 1, "it fails"), "d02": ("quarantine", 2, QUARANTINED)}
    assert killed == [KILLS_READER] * (MOST_DEATHS_ALONE + 1)


def test_worker_without_a_watch_and_with_probes(tmp_path):
    """In this process: every output brings the probes along, since any of them may be the first to arrive."""
    table = EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")
    job = replace(job_of(table.uri, tmp_path / "log", 100), probes=document_table(["canary-0", "p"], ["x", "four"]))
    worker = EmbedAndWrite(job, None)
    documents = document_table(["a", "b"], ["one", FAILS])
    tokens = WordCounter(job)(documents.append_column(POSITION, pa.array([0, 1], pa.int64())))
    (first,), (second,) = worker(tokens).to_pylist(), worker(tokens).to_pylist()
    found = from_bytes(first["probes"])
    assert {key: vector.tolist() for key, vector in found.items()} == {
        ("canary-0", -1): [1, 1, 0, 0],
        ("p", -1): [4, 1, 0, 0],
    }
    assert second["probes"] == first["probes"]
    (dead,) = json.loads(first["dead"])
    assert (dead["document_id"], dead["stage"], dead["error"]) == ("b", "embed", "it fails")
    assert bytes.fromhex(dead["text_hash"]) == documents["text_hash"][1].as_py()


def test_a_quarantined_text_is_not_looked_at_again():
    documents = pa.table(
        {"document_id": ["a"], "text": pa.array(["t"], pa.large_string()), "error": pa.nulls(1, pa.string())}
    )
    (row,) = without_text(documents).to_pylist()
    assert row == {"document_id": "a", "text": "", "error": QUARANTINED}
    told = letter(
        {"document_id": "a", "text_hash": b"\x00" * 16, "source": "s", "stage": "tokens", "error": QUARANTINED}
    )
    assert (told["stage"], told["attempts"]) == ("quarantine", MOST_DEATHS_ALONE)


@pytest.mark.parametrize(("longest_s", "left_s", "stays"), [(0.0, 1.0, True), (10.0, 30.0, True), (10.0, 12.0, False)])
def test_a_worker_leaves_before_work_that_it_could_not_finish(longest_s, left_s, stays, monkeypatch):
    left: list[int] = []
    monkeypatch.setattr("pipeline.workers.os._exit", left.append)
    monkeypatch.setattr(Departure, "time_left_s", lambda self: left_s)
    departure = Departure()
    departure.took(longest_s)
    departure.took(longest_s / 2)
    departure.leave_if_late()
    assert left == ([] if stays else [1])


@pytest.mark.usefixtures("ray_session")
def test_a_machine_that_stays_has_all_the_time():
    assert Departure().time_left_s() == math.inf
