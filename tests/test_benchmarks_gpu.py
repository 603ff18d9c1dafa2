"""The GPU script, dry: every piece runs on a CPU, wrong results show, and the time budget is kept."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_peers import padded
from model import attention
from model.config import preset

DRY = ["--device", "cpu", "--presets", "tiny", "--lengths", "64", "--tokens", "256", "--dtype", "bfloat16"]
DRY += ["--case-s", "0"]


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHECKED_LENGTHS", (1, 65, 130))


def test_a_dry_run_has_every_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*DRY, "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    checked = [row for row in record["check"] if "right" in row]
    assert {(row["backend"], row["dtype"]) for row in checked} >= {("blocks", "float16"), ("blocks", "bfloat16")}
    assert all(row["right"] for row in checked)
    assert [row["backend"] for row in record["check"] if "refused" in row].count("varlen") == 3
    assert [row["kind"] for row in record["inference"]] == ["fixed", "mixed"]
    for row in record["inference"] + record["training"]:
        assert row["tokens"] == 256
        assert row["tokens_per_s"] > 0
    for row in record["peers"]:
        assert row["sdpa"]["cosine_min"] > 0.99
        assert row["eager"]["cosine_min"] > 0.99


def test_a_wrong_back_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = attention._Backend(attention._no_bias, lambda q, k, v, plan: v)
    monkeypatch.setitem(attention.BACKENDS, "blocks", leaking)
    assert gpu.main([*DRY, "--pieces", "check", "--out", str(tmp_path)]) == 1


def test_when_the_time_is_over_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*DRY, "--budget-s", "0", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = record["check"] + record["inference"] + record["training"] + record["peers"]
    assert {row.get("skipped", "time") for row in rows if "refused" not in row} == {"time"}


def test_lengths_fill_the_batch() -> None:
    assert gpu.lengths_of("fixed", 64, 256) == [64] * 4
    assert gpu.lengths_of("fixed", 512, 256) == [512]
    mixed = gpu.lengths_of("mixed", 64, 1_000)
    assert sum(mixed) == 1_000
    assert 1 <= min(mixed) < max(mixed) <= 64
    batch = gpu.packed(mixed, preset("base", **gpu.TINY), torch.device("cpu"))
    assert batch.num_tokens == 1_000


def test_padding_puts_every_token_in_its_place() -> None:
    ids, mask = padded(torch.tensor([1, 2, 3]), [2, 1])
    assert ids.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
