"""From files to a readable table, end to end: this project beside what people copy, with the same weights.

Every run is a process of its own, timed from its start to its end, peers interleaved round by round. The same command
on a corpus of one word says what starting up costs, and is shown apart. Vectors are compared with
sentence-transformers in float32, on a part of the documents. See benchmarks/README.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.embed_cpu import BATCH_SIZES, TINY, build, compare
from benchmarks.peers import Workload, save_model
from benchmarks.scale import s3
from benchmarks.setting import HOME, environment, keep, say
from model.config import preset
from pipeline import storage

NIGHTLOOM, RAY, DAFT, POLARS = "nightloom", "ray template", "daft embed_text", "sentence-transformers + polars"
ON_RAY = "nightloom on Ray"
"""As it does more than a little work: what it does after start-up holds for large corpora."""
OURS = (NIGHTLOOM, ON_RAY)
PEERS = (*OURS, RAY, DAFT, POLARS)
ONCE = (DAFT,)
"""Several times as slow as the others: one round."""
FILES = 4
COMPARED = 8
"""Documents whose vectors are compared with float32."""


# In the child: one peer, as its users write it


def sentence_transformer(model: str, dtype: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return SentenceTransformer(
        model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}, local_files_only=True
    )


def run_ray(source: str, out: str, model: str, dtype: str, batch_size: int) -> None:
    """read -> map_batches(an actor with SentenceTransformer, which sorts by length) -> write_parquet."""
    import ray

    class Embed:
        def __init__(self) -> None:
            self.model = sentence_transformer(model, dtype)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["vector"] = self.model.encode(list(batch["text"]), batch_size=batch_size).astype(np.float32)
            return batch

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    files, path = storage.filesystem(source)
    data = ray.data.read_parquet(path, filesystem=files)
    data = data.map_batches(Embed, batch_size=1024, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=2)
    files, path = storage.filesystem(out)
    data.drop_columns(["text"]).write_parquet(path, filesystem=files)


def run_polars(source: str, out: str, model: str, dtype: str, batch_size: int) -> None:
    import polars as pl

    files, path = storage.filesystem(source)
    frame = pl.from_arrow(pq.read_table(path, filesystem=files))
    assert isinstance(frame, pl.DataFrame)
    vectors = sentence_transformer(model, dtype).encode(frame["text"].to_list(), batch_size=batch_size)
    done = frame.select("id").with_columns(vector=pl.Series(vectors.astype(np.float32)))
    files, path = storage.filesystem(out)
    files.create_dir(path)
    pq.write_table(done.to_arrow(), f"{path}/part.parquet", filesystem=files)


def run_daft(source: str, out: str, model: str, dtype: str, batch_size: int) -> None:
    """Its provider has neither a dtype nor a batch size of the encoder: float32, 32 at a time."""
    import daft  # type: ignore[import-not-found]
    from daft.functions import embed_text  # type: ignore[import-not-found]
    from daft.io import IOConfig, S3Config  # type: ignore[import-not-found]

    known = storage.s3_settings()
    options = S3Config(
        endpoint_url=known.endpoint, region_name=known.region, key_id=known.access_key, access_key=known.secret_key
    )
    config = IOConfig(s3=options) if storage.is_s3(source) else None
    frame = daft.read_parquet(f"{source}/*.parquet", io_config=config)
    vector = embed_text(frame["text"], provider="transformers", model=model)
    frame.with_column("vector", vector).select("id", "vector").write_parquet(out, io_config=config)


CHILDREN: dict[str, Callable[[str, str, str, str, int], None]] = {RAY: run_ray, POLARS: run_polars, DAFT: run_daft}


# In the parent


def command(peer: str, source: str, out: str, model: Path, dtype: str, batch_size: int) -> list[str]:
    if peer in OURS:
        words = ["-m", "jobs.cli", "embed", source, out, "--model", str(model), "--json"]
        words += ["--set", "compute.single_chars=0"] if peer == ON_RAY else []
        return [sys.executable, *words, "--set", f"vectors.dtype={dtype}"]
    return [
        sys.executable,
        "-m",
        "benchmarks.pipeline",
        "--child",
        peer,
        source,
        out,
        str(model),
        dtype,
        str(batch_size),
    ]


def timed(words: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=HOME.parent, capture_output=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace").strip().splitlines()[-1][:500])
    return seconds


def write_files(workload: Workload, where: str) -> None:
    files, path = storage.filesystem(where)
    files.create_dir(path)
    ids = [f"{workload.name}-{number}" for number in range(len(workload.texts))]
    for part in range(FILES):
        table = pa.table({"id": ids[part::FILES], "text": workload.texts[part::FILES]})
        if len(table):
            pq.write_table(table, f"{path}/{part}.parquet", filesystem=files)


def read_vectors(peer: str, out: str, workload: Workload) -> np.ndarray:
    """Unit vectors of shape (documents, dim), in the order of the workload: what a reader finds."""
    if peer in OURS:
        import lance

        from pipeline.table import PUBLISHED

        table = lance.dataset(out, version=PUBLISHED, storage_options=storage.lance_options(out)).to_table()
        table = table.rename_columns(["id" if name == "document_id" else name for name in table.column_names])
    else:
        files, path = storage.filesystem(out)
        table = pq.read_table(path, filesystem=files, columns=["id", "vector"])
    order = np.argsort([int(name.rpartition("-")[2]) for name in table["id"].to_pylist()])
    assert len(order) == len(workload.texts), f"{peer}: {len(order)} rows of {len(workload.texts)} documents"
    vectors = np.array(table["vector"].to_pylist(), np.float64)[order]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def choose_batch_size(workload: Workload, model: Path, dtype: str) -> tuple[int, dict[int, float]]:
    """The one at which sentence-transformers is fastest, on a quarter of the documents; and seconds at each."""
    encoder = sentence_transformer(str(model), dtype)
    sample = workload.part(4).texts
    encoder.encode(sample[:2])
    tried = {}
    for size in BATCH_SIZES[workload.name]:
        if size > len(sample):  # it would say nothing about the padding of whole batches
            break
        begun = time.perf_counter()
        encoder.encode(sample, batch_size=size)
        tried[size] = round(time.perf_counter() - begun, 3)
    return min(tried, key=tried.__getitem__), tried


def measure(workload: Workload, where: str, model: Path, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Rounds in which every peer has one turn, on the documents and on one word."""
    best, tried = choose_batch_size(workload, model, dtype)
    say(f"{workload.name}: batch size {best}; seconds {tried}")
    one = Workload("one", ["w5"], [[1, 5, 2]])
    write_files(workload, f"{where}/{workload.name}")
    write_files(one, f"{where}/one")
    found: dict[str, dict[str, Any]] = {peer: {"seconds": [], "startup_s": []} for peer in arguments.peers}
    for turn in range(arguments.repeats):
        for peer, result in found.items():
            if "failed" in result or (turn and peer in ONCE):
                continue
            slug = peer.replace(" ", "-")
            try:
                for name, seconds in (("one", result["startup_s"]), (workload.name, result["seconds"])):
                    out = f"{where}/out-{slug}-{workload.name}-{name}-{turn}" + (".lance" if peer in OURS else "")
                    seconds.append(round(timed(command(peer, f"{where}/{name}", out, model, dtype, best)), 3))
                result["vectors"] = read_vectors(peer, out, workload)
                say(f"{workload.name}: round {turn + 1}, {peer} {seconds[-1]} s, one word {result['startup_s'][-1]} s")
            except (RuntimeError, AssertionError, OSError) as error:
                result["failed"] = str(error)
                say(f"{workload.name}: {peer} failed: {error}")
    tokens = sum(workload.lengths)
    sample = sorted(range(len(workload.texts)), key=lambda i: len(workload.ids[i]))[
        :: max(1, len(workload.texts) // COMPARED)
    ]
    reference = sentence_transformer(str(model), "float32").encode([workload.texts[i] for i in sample], batch_size=1)
    reference = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    peers = {}
    for peer, result in found.items():
        if "failed" in result:
            peers[peer] = {"failed": result["failed"]}
            continue
        whole, startup = statistics.median(result["seconds"]), statistics.median(result["startup_s"])
        peers[peer] = {
            "seconds": result["seconds"],
            "startup_s": result["startup_s"],
            "tokens_per_s": round(tokens / whole, 1),
            # Noise, where the documents take no longer than starting up.
            "tokens_per_s_after_startup": round(tokens / (whole - startup), 1) if whole > startup else None,
            **compare(result["vectors"][sample], reference),
        }
    return {
        "documents": len(workload.texts),
        "tokens": tokens,
        "batch_size": best,
        "batch_sizes_tried_s": tried,
        "compared": len(sample),
        "peers": peers,
        "ratios": ratios(peers),
    }


def ratios(peers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours over each of the others, with start-up and without."""
    result: dict[str, dict[str, float]] = {}
    for key in ("tokens_per_s", "tokens_per_s_after_startup"):
        ours = peers.get(NIGHTLOOM, {}).get(key)
        others = {name: speed for name, peer in peers.items() if name not in OURS and (speed := peer.get(key))}
        if ours:
            result[key] = {name: round(ours / speed, 2) for name, speed in others.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="base", help="a preset of model.config, or tiny (tries the benchmark itself)"
    )
    parser.add_argument("--workloads", nargs="+", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--places", nargs="+", default=["disk", "s3"], choices=["disk", "s3"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the documents, of the same distribution")
    parser.add_argument("--tag", default="", help="a word more in the record's name")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        peer, source, out, model_path, dtype, batch_size = arguments.child
        CHILDREN[peer](source, out, model_path, dtype, int(batch_size))
        return
    tiny = arguments.preset == "tiny"
    dtype = "float32" if tiny else "bfloat16"
    config = preset("base" if tiny else arguments.preset, **(TINY if tiny else {}), pad_id=0, cls_id=1, sep_id=2)
    record: dict[str, Any] = {
        "benchmark": "pipeline",
        "preset": arguments.preset,
        "scale": arguments.scale,
        "tag": arguments.tag,
        "dtype": dtype,
        "environment": environment(),
        "places": {},
    }
    with tempfile.TemporaryDirectory(prefix="nightloom-pipeline-") as temporary, ExitStack() as servers:
        model = Path(temporary) / "model"
        save_model(config, model)
        for place in arguments.places:
            where = f"{temporary}/disk"
            if place == "s3":
                (Path(temporary) / "s3").mkdir()
                where = servers.enter_context(s3(Path(temporary) / "s3"))
            results = record["places"][place] = {}
            for name in arguments.workloads:
                workload = build(name, config, arguments.scale, 0.1 if tiny else 1.0)
                results[name] = measure(workload, where, model, arguments, dtype)
                path = keep(record, arguments.out)
            shutil.rmtree(f"{temporary}/disk", ignore_errors=True)
    say(f"kept in {path}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
