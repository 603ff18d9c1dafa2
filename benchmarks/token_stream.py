"""How fast does a corpus become token shards, and how fast do token shards become masked bins?

    python -m benchmarks.token_stream [--source corpus] [--epochs 20] [--tag WORD]

The corpus is prepared twice: once as a job is (Ray included), once in this process, where the time is tokenizing,
finding sentences and writing. The stream then runs over whole epochs, and every epoch is checked to have each token of
the corpus once. Speeds are tokens a second of one core: over the processor time of all threads. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.setting import HOME, environment, keep, say
from jobs.configuration import PrepareConfiguration
from jobs.plan import read_columns
from jobs.prepare import list_files, look_at, run_prepare
from pipeline.preparation import choose_documents, make_tasks, plan_shards, write_shards
from pipeline.shards import TokenShards
from pipeline.stream import StreamConfig, TokenStream
from pipeline.vocabulary import copy_tokenizer, read_vocabulary

MODEL = HOME.parent / "models" / "nightloom-small"
SHAPES = (
    {"max_tokens": 1024, "tokens_per_bin": 1024},
    {"max_tokens": 1024, "tokens_per_bin": 8192},
    {"max_tokens": 1024, "tokens_per_bin": 8192, "ordering": True},
    {"max_tokens": 8192, "tokens_per_bin": 8192},
    {"max_tokens": 8192, "tokens_per_bin": 16_384},
)


def prepare(source: str, place: Path) -> dict[str, Any]:
    """Seconds and speed of the job, and of its work alone."""
    configuration = PrepareConfiguration(source=source, tokens=str(place / "job"), tokenizer=str(MODEL), heldout=0.0)
    report = run_prepare(configuration)
    columns = read_columns(configuration.columns)
    uri = str(place / "alone")
    copy_tokenizer(MODEL, uri)
    vocabulary = read_vocabulary(MODEL)
    begun, used = time.perf_counter(), time.process_time()
    files = list_files(source, uri, columns)
    documents = choose_documents(look_at(files, columns, in_process=True), 0.0)
    plans = plan_shards(documents, configuration.shard_bytes)
    records = [
        json.loads(row)
        for task in make_tasks(plans, documents, files)
        for table in write_shards(
            task,
            uri=uri,
            columns=columns,
            tokenizer_hash=vocabulary.hash,
            vocab_size=vocabulary.size,
            fingerprint="",
        )
        for row in table["record"].to_pylist()
    ]
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    entries = TokenShards.open(report.place).manifest.shards["train"]
    return {
        "documents": report.train,
        "tokens": report.tokens,
        "text_bytes": int(documents.bytes_D.sum()),
        "job_s": report.seconds,
        "alone_s": round(seconds, 2),
        "alone_tokens_per_core_s": round(report.tokens / used),
        "same_shards": [r["entry"]["hash"] for r in records] == [entry.hash for entry in entries],
    }


def stream(shards: TokenShards, shape: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Speed and fill over whole epochs."""
    config = StreamConfig(tokens_per_step=4 * shape["tokens_per_bin"], **shape)
    text = [0] * (epochs + 1)
    tokens = bins = masked = 0
    begun, used = time.perf_counter(), time.process_time()
    with closing(TokenStream(shards, config).steps()) as steps:
        for step in steps:
            for one in step.bins:
                if one.epoch < epochs:
                    text[one.epoch] += int(np.count_nonzero(one.positions_T >= 0))
                    tokens, bins, masked = tokens + one.num_tokens, bins + 1, masked + len(one.masked_M)
            if step.after.epoch >= epochs:
                break
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    return {
        **shape,
        "bins_per_epoch": bins / epochs,
        "tokens_per_core_s": round(tokens / used),
        "tokens_per_s": round(tokens / seconds),
        "unfilled": round(1 - tokens / bins / shape["tokens_per_bin"], 5),
        "masked": round(masked / sum(text), 4),
        "every_token_once": all(count == shards.manifest.num_tokens() for count in text[:epochs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(HOME.parent / "corpus"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--tag")
    options = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "token_stream", "tag": options.tag, "environment": environment()}
    record["corpus"] = Path(options.source).name
    with tempfile.TemporaryDirectory() as folder:
        record["prepare"] = prepare(options.source, Path(folder))
        say(json.dumps(record["prepare"]))
        shards = TokenShards.open(str(Path(folder) / "job"))
        record["stream"] = []
        for shape in SHAPES:
            record["stream"].append(stream(shards, shape, options.epochs))
            say(json.dumps(record["stream"][-1]))
    say(str(keep(record, HOME / "results")))
    rows = ["| longest sequence | bin | ordering | tokens per core second | not filled |", "|---:|---:|---|---:|---:|"]
    for r in record["stream"]:
        speed = f"{r['tokens_per_core_s'] / 1e6:.1f} M"
        ordering = "yes" if r.get("ordering") else ""
        rows.append(f"| {r['max_tokens']:,} | {r['tokens_per_bin']:,} | {ordering} | {speed} | {r['unfilled']:.2%} |")
    print("\n".join(rows))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
