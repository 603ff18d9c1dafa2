"""What selecting k blocks of keys in global layers costs in quality and gains in time, on the bundled model.

Documents of the bundled corpus, joined to long ones; full attention against k blocks, one process, interleaved round by
round. The model was trained with full attention at shorter lengths: the table says what selection does to it as it is.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.setting import HOME, environment, keep, say
from jobs.quantize import compare
from model.batch import PackedBatch, pack
from model.embedder import Embedder
from model.flops import cost

CHUNK = 256
"""Tokens of a piece that gets a vector of its own, beside the whole document's."""


def long_documents(embedder: Embedder, num_tokens: int, count: int) -> list[PackedBatch]:
    """Documents of exactly so many tokens, the corpus joined end to end."""
    texts = pq.read_table(HOME.parent / "corpus" / "documents.parquet")["text"].to_pylist()
    ids = np.concatenate([encoding.ids for encoding in embedder.tokenizer.encode_batch_fast(texts)])
    count = min(count, len(ids) // num_tokens)
    assert count, f"the corpus has {len(ids)} tokens"
    return [pack([part]) for part in ids[: count * num_tokens].reshape(count, num_tokens)]


def embed(embedder: Embedder, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray, float]:
    """The document's vector, those of its pieces, and the seconds of the forward pass."""
    edges = np.arange(0, batch.num_tokens + 1, CHUNK)
    starts, ends = np.append(edges[:-1], 0), np.append(edges[1:], batch.num_tokens)
    began = time.perf_counter()
    sums, weights = embedder.embed_segments(batch, starts, ends)
    seconds = time.perf_counter() - began
    vectors = embedder.finish(sums, weights, normalize=True)
    return vectors[-1:], vectors[:-1], seconds


def agreement(ours: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """Cosines to full attention's vectors, and with their mean taken off both; how often the nearest other agrees."""
    names = None if len(full) > 2 else ("cosine_mean", "cosine_min")
    return {name: round(value, 5) for name, value in compare(ours, full).items() if names is None or name in names}


def measure(embedder: Embedder, num_tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for full attention and for every k that is less than all blocks."""
    config = replace(embedder.config, sparse_block_size=options.block_size)
    settings = [None, *(k for k in options.key_blocks if k * options.block_size < num_tokens)]
    documents = long_documents(embedder, num_tokens, options.documents)
    seconds: dict[int | None, list[float]] = {k: [] for k in settings}
    whole: dict[int | None, list[np.ndarray]] = {k: [] for k in settings}
    pieces: dict[int | None, list[np.ndarray]] = {k: [] for k in settings}
    for round_, batch in enumerate([documents[0], *documents]):
        for k in settings:
            if round_ == 0 and k is None:
                continue  # the first round warms up, which full attention needs least
            embedder.encoder.config = replace(config, sparse_key_blocks=k)
            document, parts, took = embed(embedder, batch)
            if round_:
                seconds[k].append(took)
                whole[k].append(document)
                pieces[k].append(parts)
    rows = []
    for k in settings:
        flops = cost(replace(config, sparse_key_blocks=k), [num_tokens])
        row: dict[str, Any] = {"tokens": num_tokens, "documents": len(documents), "key_blocks": k}
        row |= {"seconds": [round(s, 3) for s in seconds[k]], "gflop": round(flops.flops / 1e9, 1)}
        row["document"] = agreement(np.concatenate(whole[k]), np.concatenate(whole[None]))
        row["pieces"] = agreement(np.concatenate(pieces[k]), np.concatenate(pieces[None]))
        say(json.dumps(row))
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | k | seconds | times full | document cosine | pieces: mean | min | centred | same nearest |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    full: dict[int, float] = {}
    for row in rows:
        took = min(row["seconds"])  # what else runs on the machine can only add
        full.setdefault(row["tokens"], took)
        piece = row["pieces"]
        lines.append(
            f"| {row['tokens']:,} | {row['key_blocks'] or 'full'} | {took:.2f} | {full[row['tokens']] / took:.2f} | "
            f"{row['document']['cosine_min']:.4f} | {piece['cosine_mean']:.4f} | {piece['cosine_min']:.4f} | "
            f"{piece['centred_cosine_mean']:.4f} | {piece['same_nearest']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(HOME.parent / "models" / "nightloom-small"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8_192, 16_384, 32_768, 65_536])
    parser.add_argument("--key-blocks", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--documents", type=int, default=3, help="at each length")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tag", default="", help="ends the name of the record")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    embedder = Embedder(options.model, device="cpu", dtype=options.dtype)
    record: dict[str, Any] = {"benchmark": "sparse", "environment": environment(), "rows": []}
    record |= {"tag": options.tag, "dtype": options.dtype, "attention": embedder.attention_name}
    record |= {"block_size": options.block_size, "piece_tokens": CHUNK}
    for num_tokens in options.lengths:
        record["rows"] += measure(embedder, num_tokens, options)
        path = keep(record, options.out)  # after each length
    say(f"kept in {path}")
    print(table(record["rows"]))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
