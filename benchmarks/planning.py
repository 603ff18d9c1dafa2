"""How much memory and time planning takes on the driver, by the number of documents.

    python -m benchmarks.planning                       # 100,000 and 1 million documents, local disk

A table that holds every document, a corpus in which one in a hundred changed. Each case in a process of its own: first
with every file read, then again with what the files hold on record. The counts are checked.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.setting import environment, keep, say
from cluster.session import session
from pipeline import sources
from pipeline.columns import DocumentColumns, hash_texts
from pipeline.keys import Keys
from pipeline.recipe import Recipe
from pipeline.storage import list_sources
from pipeline.survey import Options, RayTasks, make_plan
from pipeline.table import EmbeddingTable, write_fragment

FILE_DOCUMENTS = 20_000
CHANGED_EVERY = 100
RECIPE = Recipe(
    weights="w",
    tokenizer="t",
    pooling="mean",
    normalize=True,
    prompt="",
    granularity="document",
    max_tokens=512,
    long_documents="window",
    overlap_tokens=64,
    chunk_tokens=None,
    context=None,
    dtype="float32",
    vector_type="float32",
    dim=2,
)


def texts_of(first: int, count: int) -> list[str]:
    return [f"document {n} " + "of some words that are always the same " * 4 for n in range(first, first + count)]


def prepare(folder: Path, documents: int) -> None:
    """A corpus, and a table that holds all of it but for one document in CHANGED_EVERY."""
    (folder / "in").mkdir()
    table = EmbeddingTable.create(str(folder / "table.lance"), RECIPE, model="none")
    added = []
    for first in range(0, documents, FILE_DOCUMENTS):
        count = min(FILE_DOCUMENTS, documents - first)
        texts = texts_of(first, count)
        ids = pa.array([f"d{n}" for n in range(first, first + count)])
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / "in" / f"{first:09}.parquet")
        held = [f"old {t}" if n % CHANGED_EVERY == 0 else t for n, t in enumerate(texts)]
        numbers = {"chunk": -1, "char_start": 0, "char_end": 1, "token_start": 0, "token_end": 1}
        columns: dict[str, Any] = {name: pa.array(np.full(count, value)) for name, value in numbers.items()}
        columns |= {"document_id": ids, "text_hash": hash_texts(pa.array(held, pa.large_string()))}
        columns["source"] = pa.array([""] * count)
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * count, np.float32)), 2)
        added.append(write_fragment(table.uri, pa.table(columns), "r"))
    table.commit(added, np.empty(0, "S16"), Keys.empty(), run="r")


def measure(folder: Path, documents: int) -> dict[str, Any]:
    """Plan in this process: seconds, and the most memory that it ever had, in MB."""
    sources.RACY_NS = 0
    columns = DocumentColumns()
    files = list_sources(str(folder / "in"))
    with session(num_cpus=4):
        table = EmbeddingTable.open(str(folder / "table.lance"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        begun = time.perf_counter()
        plan = make_plan(files, columns, table.uri, table, Options(), RayTasks(), least_chars=400_000, keep=True)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    changed = sum(
        -(-min(FILE_DOCUMENTS, documents - at) // CHANGED_EVERY) for at in range(0, documents, FILE_DOCUMENTS)
    )
    assert plan.counts["read"] == documents
    assert plan.counts["changed"] == plan.num_documents == len(plan.removals.ids) == changed
    return {"seconds": round(seconds, 2), "driver_mb_before": round(before, 1), "driver_mb_peak": round(peak, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "DOCUMENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Path(options.case[0]), int(options.case[1]))))
        return
    record: dict[str, Any] = {"benchmark": "planning", "environment": environment(), "cases": {}}
    for documents in options.documents:
        with tempfile.TemporaryDirectory() as name:
            say(f"{documents:,} documents: making corpus and table")
            prepare(Path(name), documents)
            case = [sys.executable, "-m", "benchmarks.planning", "--case", name, str(documents)]
            found = {}
            for night in ("files_read", "files_on_record"):
                out = subprocess.run(case, stdout=subprocess.PIPE, text=True, check=True).stdout
                found[night] = json.loads(out.splitlines()[-1])
                say(f"{night}: {found[night]}")
            record["cases"][str(documents)] = found
    cases = list(record["cases"].values())
    record["growth_of_peak"] = {
        night: round(cases[-1][night]["driver_mb_peak"] / cases[0][night]["driver_mb_peak"], 3) for night in cases[0]
    }
    keep(record, options.results)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
