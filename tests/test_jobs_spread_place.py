"""Where a run does its work: one process while there is little, else Ray's workers; and the same table either way."""

import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest
from test_jobs_embed import configured, write_corpus

from jobs import spread
from jobs.configuration import ComputeSettings
from jobs.embed import run_embed
from jobs.spread import BLOCK_CHARS, Place
from pipeline.table import PUBLISHED
from pipeline.workers import Workers


@pytest.fixture
def place(monkeypatch):
    """Of a run on a machine of two cores, where no session is; Ray only seems to start."""
    monkeypatch.delenv("NIGHTLOOM_ADDRESS", raising=False)
    monkeypatch.delenv("NIGHTLOOM_METRICS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(spread, "physical_cores", lambda: 2)
    monkeypatch.setattr(spread, "session", lambda *_, **__: nullcontext())
    on_ray = Workers(actors=7, device="cpu", threads=1, tokens_per_batch=None, block_chars=1)
    monkeypatch.setattr(spread, "plan_workers", lambda compute, device: on_ray)
    monkeypatch.setattr(spread, "choose_device", lambda *_: "cpu")
    monkeypatch.setattr(spread, "dtype_of_workers", lambda *_: "float32")
    with Place(ComputeSettings()) as made:
        yield made


def test_little_work_starts_one_process(place):
    place.start(1_000)
    assert place.single is not None
    assert not place.on_ray
    assert place.workers() == Workers(1, "cpu", 2, None, BLOCK_CHARS["cpu"])
    before = place.single
    place.start(2_000)
    assert place.single is before


def test_text_that_was_more_than_its_file_goes_to_ray(place):
    """A compressed file says little of the text in it."""
    place.start(1_000)
    pid = place.single.pid.result()
    place.start(10**9)
    assert place.single is None
    assert place.on_ray
    assert place.workers().actors == 7
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_a_process_that_dies_while_it_starts_is_replaced_by_ray(place):
    place.start(1_000)
    os.kill(place.single.pid.result(), signal.SIGKILL)
    assert place.workers().actors == 7
    assert place.on_ray


def test_metrics_want_ray(place, monkeypatch):
    monkeypatch.setenv("NIGHTLOOM_METRICS", "on")
    place.start(1_000)
    assert place.on_ray


def test_the_same_table_either_way(ray_session, tiny_model_folder, tmp_path, monkeypatch):
    """Ray is there and does one of them; the other is made as where it is not."""
    write_corpus(tmp_path / "corpus", 12)
    tables = {}
    for name, initialized in (("ray", True), ("single", False)):
        table = tmp_path / f"{name}.lance"
        with monkeypatch.context() as patch:
            patch.setattr("ray.is_initialized", lambda initialized=initialized: initialized)
            report = run_embed(configured(tmp_path / "corpus", table, tiny_model_folder, "chunking.granularity=both"))
        assert report.status == "published"
        rows = (
            lance.dataset(str(table), version=PUBLISHED)
            .to_table()
            .sort_by([("document_id", "ascending"), ("chunk", "ascending")])
        )
        tables[name] = (replace(report, table="", seconds=0, tokens_per_s=0), rows)
    (one, rows), (other, others) = tables.values()
    assert one == other
    plain = [name for name in rows.column_names if name not in ("run", "vector")]
    assert rows.select(plain).equals(others.select(plain))
    vectors = [np.array(found["vector"].to_pylist()) for found in (rows, others)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
