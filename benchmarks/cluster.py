"""Do two machines do the work of two, and three that of three? And what do driver and object store hold meanwhile?

Raylets on one machine cannot compute more than it can, so the encoder is a stub that sleeps a fixed time for every unit
of work: what is measured is everything else of `nightloom embed` on a cluster, reading, tokenizing, writing, committing
and Ray's own scheduling. The work grows with the machines; ideal is the same time for all. One actor a machine. The
start of the workers is part of it, and on few cores the most of what is lost; the rate from a quarter of the documents
to the end stands beside it.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embed_cpu import TINY
from benchmarks.peers import save_model
from benchmarks.scale import Memory, Stub, status_kib
from benchmarks.setting import HOME, environment, keep, say
from jobs.configuration import EmbedConfiguration, load
from model.config import preset
from pipeline.workers import Job

UNIT_S = 1.0
"""What the encoder takes for a unit of work: as real ones do on a GPU, see BLOCK_CHARS in jobs/spread.py."""
BLOCK_CHARS = 100_000
DOCUMENTS_PER_UNIT = 25
OBJECT_STORE = 300_000_000
LEAST = 0.9
"""Of linear."""
STARTED = 0.25
"""So much of the documents has arrived when every worker has long been at work."""


class Sleeper(Stub):
    """A stub that takes its time."""

    def embed(self, table: Any) -> Any:
        time.sleep(UNIT_S)
        return super().embed(table)


def write_units(folder: Path, units: int) -> None:
    """A file of documents that make so many units of work."""
    folder.mkdir()
    text = "w5 w7 w11 w13 " * (BLOCK_CHARS // DOCUMENTS_PER_UNIT // 14)
    for unit in range(units):
        lines = (json.dumps({"id": f"{unit}-{n}", "text": f"w{unit} w{n} {text}"}) for n in range(DOCUMENTS_PER_UNIT))
        (folder / f"{unit:04}.jsonl").write_text("\n".join(lines), encoding="utf-8")


class Store(threading.Thread):
    """Watches the cluster's object stores: the most that was in use."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        import ray

        while not self.over.wait(0.5):
            if ray.is_initialized():
                key = "object_store_memory"
                used = ray.cluster_resources().get(key, 0) - ray.available_resources().get(key, 0)
                self.most = max(self.most, used)


def run_child(source: str, table: str, model: str, machines: int) -> dict[str, Any]:
    """One `nightloom embed` on the cluster of NIGHTLOOM_ADDRESS."""
    import jobs.embed

    jobs.embed.Job = functools.partial(Job, encoder=Sleeper)  # type: ignore[misc,assignment]
    sets = [f"compute.actors={machines}", f"compute.block_chars={BLOCK_CHARS}", "gates.off=collapse"]
    given = {"source": source, "table": table, "model": model}
    configuration = load(EmbedConfiguration, file=None, sets=["vectors.dtype=float32", *sets], given=given)
    memory, store = Memory(), Store()
    memory.start()
    store.start()
    begun = time.perf_counter()
    report = jobs.embed.run_embed(configuration)
    seconds = time.perf_counter() - begun
    memory.over.set()
    store.over.set()
    record = json.loads(sorted((Path(table) / "_runs").glob("*.json"))[-1].read_text(encoding="utf-8"))
    return {
        "machines": machines,
        "embedded": report.embedded,
        "seconds": round(seconds, 2),
        "embedding_s": record["embedding_s"],
        "after_start_s": after_start(record["timeline"]["rows"]),
        "wasted_tokens": report.wasted_tokens,
        "driver_peak_own_mib": round(memory.most_kib / 1024, 1),
        "driver_peak_rss_mib": round(status_kib("VmHWM") / 1024, 1),
        "object_stores_peak_mb": round(store.most / 1e6, 1),
    }


def after_start(rows: list[list[float]]) -> float:
    """Seconds from when STARTED of the documents had arrived to when the last had."""
    seconds, documents, _ = np.array(rows).T
    return round(float(seconds[-1] - np.interp(STARTED * documents[-1], documents, seconds)), 2)


def measure(machines: int, units: int, model: Path, folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(HOME.parent / "tests"))
    from clusters import Machines  # type: ignore[import-not-found]

    source = folder / f"source-{machines}"
    write_units(source, units * machines)
    node = {"object_store_memory": OBJECT_STORE}
    cluster = Machines(
        node | {"num_cpus": 2},
        *[node | {"num_cpus": 3, "resources": {f"rack-{number}": 1}} for number in range(machines)],
        PYTHONPATH=str(HOME.parent),
    )
    try:
        command = ["--child", str(source), str(folder / f"{machines}.lance"), str(model), str(machines)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cluster", *command],
            cwd=HOME.parent,
            env=os.environ | {"NIGHTLOOM_ADDRESS": cluster.address, "RAY_TMPDIR": str(cluster.folder)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        cluster.stop()
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["embedded"] == units * machines * DOCUMENTS_PER_UNIT, result
    say(f"{machines} machines: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--units", type=int, default=120, help="units of work for each machine")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, table, model, machines = options.child
        print(json.dumps(run_child(source, table, model, int(machines))))
        return
    with tempfile.TemporaryDirectory(prefix="nlb", dir="/tmp") as name:
        folder = Path(name)
        model = folder / "model"
        save_model(preset("base", **TINY, pad_id=0, cls_id=1, sep_id=2), model)
        found = {str(n): measure(n, options.units, model, folder) for n in options.machines}
    for result in found.values():
        units = options.units * result["machines"]
        result["units_per_s"] = round(units / result["embedding_s"], 3)
        result["units_per_s_after_start"] = round((1 - STARTED) * units / result["after_start_s"], 3)
    first = found[str(options.machines[0])]
    for result in found.values():
        for of, rate in (("of_linear", "units_per_s"), ("of_linear_after_start", "units_per_s_after_start")):
            result[of] = round(result[rate] / result["machines"] / (first[rate] / first["machines"]), 3)
    record = {
        "benchmark": "cluster",
        "environment": environment(),
        "setting": {"unit_s": UNIT_S, "units_per_machine": options.units, "block_chars": BLOCK_CHARS},
        "machines": found,
        "least_of_linear": LEAST,
        "holds": all(result["of_linear"] >= LEAST for result in found.values()),
    }
    say(str(keep(record, HOME / "results")))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
