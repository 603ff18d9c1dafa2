"""An evaluation as JSON: read back as it was, refused where it is damaged."""

import json
from pathlib import Path

import pytest

from jobs.configuration import describe, keys
from jobs.evaluation import EVALUATION, EvaluateConfiguration, Evaluation, block, read_evaluation, versions
from jobs.intervals import Figure, Interval
from model.errors import InputError


def make(**changes: object) -> Evaluation:
    half = Interval(0.5, 0.4, 0.6)
    figures = [
        Figure("s/document/ndcg@10", "s", "document", "ndcg@10", 9, half),
        Figure("s/document/mrr@10", "s", "document", "mrr@10", 9, Interval(0.45, 0.3, 0.6)),
        Figure(
            "s/bm25/ndcg@10", "s", "bm25", "ndcg@10", 9, Interval(0.4, 0.3, 0.5), "document", Interval(-0.1, -0.2, 0)
        ),
    ]
    values = {
        "job": "evaluate",
        "status": "done",
        "model": "m",
        "weights": "0" * 32,
        "tokenizer": "1" * 32,
        "sets": {"s": {"kind": "retrieval", "fingerprint": "2" * 32, "items": 9}},
        "figures": figures,
        "device": "cpu",
        "dtype": "float32",
        "versions": {"torch": "2"},
        "date": "2026-11-28T00:00:00+00:00",
        "seconds": 1.5,
        "configuration": {"seed": 0},
    }
    return Evaluation(**(values | changes))


def test_read_back_as_written(tmp_path: Path) -> None:
    (tmp_path / EVALUATION).write_text(make().to_json())
    assert read_evaluation(str(tmp_path)) == make()
    assert read_evaluation(str(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 1, "figures": 3}', "is damaged"),
        (json.dumps(make().to_tree() | {"format": 9}), "has format 9, not 1"),
        (json.dumps(make().to_tree() | {"more": 1}), "is damaged"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / EVALUATION).write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        read_evaluation(str(tmp_path))
    assert str(caught.value).endswith("evaluate again")


def test_a_block_names_each_system_once() -> None:
    assert block(make().figures, "s").splitlines() == [
        "s, 9 items",
        "  document  ndcg@10  0.500 (0.400 to 0.600)",
        "            mrr@10   0.450 (0.300 to 0.600)",
        "  bm25      ndcg@10  0.400 (0.300 to 0.500)  -0.100 (-0.200 to +0.000) against document",
    ]


def test_settings_are_described_group_by_group() -> None:
    text = "\n".join(describe(EvaluateConfiguration))
    assert "retrieval.NAME.path\n    Folder or s3:// prefix in BEIR's layout" in text
    assert "retrieval.NAME.split = test" in text
    assert "masked.*.tokens" in dict(keys(EvaluateConfiguration))


def test_versions_are_of_what_is_installed() -> None:
    assert {"torch", "numpy", "pytrec-eval-terrier"} <= set(versions())
