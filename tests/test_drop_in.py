"""The page docs/drop-in.md: every block of code on it runs, in order, and says what it says."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "drop-in.md"


def blocks() -> list[tuple[int, str]]:
    """(line, code) of every Python block of the page."""
    text = PAGE.read_text(encoding="utf-8")
    return [
        (text[: m.start()].count("\n") + 2, m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own, about pipelines on small inputs
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks()
    assert len(found) >= 7
    for line, code in found:
        # Padded with lines, so that a traceback has the page's line numbers.
        exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), names)


def test_every_pipeline_is_shown() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for task in ("fill-mask", "feature-extraction", "text-classification", "token-classification"):
        assert f'pipeline("{task}"' in text
