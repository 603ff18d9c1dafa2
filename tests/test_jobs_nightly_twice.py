"""A night that is started twice at once, killed in the middle, and started again: one published version, and one record
for each start.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
from nights import corpus_of, hashes_of, rows_of, write_corpus

from pipeline.lease import holder
from pipeline.ledger import read_records
from pipeline.table import PUBLISHED, EmbeddingTable

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 500


def start(configuration: Path) -> subprocess.Popen[str]:
    """A night of its own group of processes, as a scheduler starts it: its Ray dies with it."""
    words = [sys.executable, "-m", "jobs.cli", "nightly", str(configuration), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)


def committed(uri: str) -> int:
    """Rows that a night has committed so far."""
    table = EmbeddingTable.find(uri)
    return table.dataset.count_rows() if table else 0


def test_twice_at_once_killed_and_again(tmp_path, tiny_model_folder):
    corpus, uri = corpus_of(0, documents=240), str(tmp_path / "table.lance")
    write_corpus(corpus, tmp_path / "corpus")
    configuration = tmp_path / "nightly.toml"
    configuration.write_text(
        f'[tables.t]\nsource = "{tmp_path / "corpus"}"\ntable = "{uri}"\nmodel = "{tiny_model_folder}"\n'
        'vectors.dtype = "float32"\nchunking.granularity = "chunk"\nchunking.chunk_tokens = 48\n'
        "compute = {actors = 1, block_chars = 1500, commit_every_s = 0}\n"
    )
    until = time.monotonic() + DEADLINE_S
    both = [start(configuration), start(configuration)]
    try:
        while committed(uri) < 20:
            assert time.monotonic() < until
            assert all(run.poll() in (None, 0) for run in both), [run.communicate() for run in both]
            time.sleep(0.05)
        owner = holder(uri)
        assert owner is not None
        (writer,) = [run for run in both if run.pid == owner.pid]
        os.killpg(writer.pid, signal.SIGKILL)
        (other,) = [run for run in both if run is not writer]
        said = other.communicate(timeout=DEADLINE_S)
        assert (writer.wait(), other.returncode) == (-signal.SIGKILL, 0), said
        assert '"status": "busy"' in said[0]
        table = EmbeddingTable.open(uri)
        assert table.published_version() is None
        kept = rows_of(table.dataset)

        again = start(configuration)
        both.append(again)
        said = again.communicate(timeout=DEADLINE_S)
        assert again.returncode == 0, said
    finally:
        for run in both:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.communicate()

    wanted = hashes_of(corpus)
    seen = rows_of(lance.dataset(uri, version=PUBLISHED))
    assert {name: rows[0][-1] for name, rows in seen.items()} == wanted
    assert kept.items() <= seen.items()
    assert 0 < len(kept) < len(wanted)
    assert len(EmbeddingTable.open(uri).kept_versions()) == 1
    records = read_records(uri)
    assert sorted(record["status"] for record in records) == ["busy", "crashed", "published"]
    (last,) = [record for record in records if record["status"] == "published"]
    assert last["report"]["unchanged"] == len(kept)
    assert last["report"]["embedded"] == len(wanted) - len(kept)
