"""Token shards: what is written is read, from a disk and from S3, and what was changed since is noticed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.errors import InputError
from pipeline import shards
from pipeline.shards import (
    MANIFEST,
    Manifest,
    ShardEntry,
    TokenShards,
    list_names,
    read_file,
    read_manifest,
    remove,
    shard_table,
    write_file,
    write_shard,
)
from pipeline.tokens import list_array

TOKENS = [np.array([5, 6, 65_535]), np.array([7]), np.arange(100, 300)]


def table() -> pa.Table:
    return shard_table(
        pa.array(["a", "b", "c"]),
        np.array([1, 2, 2**64 - 1], dtype=np.uint64),
        list_array(TOKENS, pa.uint16()),
        list_array([np.array([0, 2]), np.array([0]), np.array([0, 50, 199])], pa.int32()),
    )


def fill_place(uri: str) -> Manifest:
    entry = write_shard(uri, "train-00000.arrow", table())
    manifest = Manifest(
        tokenizer="abc",
        vocab_size=65_536,
        cls_id=2,
        sep_id=3,
        mask_id=4,
        pad_id=0,
        unk_id=1,
        special_ids=(0, 1, 2, 3, 4),
        corpus="c",
        settings={"heldout": 0.01},
        counts={"read": 3},
        lengths={"train": {"4": 2, "256": 1}},
        shards={"train": (entry,), "heldout": ()},
    )
    write_file(uri, "tokenizer/tokenizer.json", b"{}")
    write_file(uri, MANIFEST, manifest.to_bytes())
    return manifest


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place without files, on a disk or on S3; the cache is empty."""
    monkeypatch.setenv("NIGHTLOOM_CACHE", str(tmp_path / "cache"))
    if request.param == "disk":
        return str(tmp_path / "tokens")
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/tokens"


def test_what_is_written_is_read(uri: str) -> None:
    assert read_manifest(uri) is None
    manifest = fill_place(uri)
    opened = TokenShards.open(uri, tokenizer="abc", fingerprint=manifest.fingerprint)
    assert opened.manifest == manifest
    assert (manifest.num_documents(), manifest.num_tokens(), manifest.num_tokens("heldout")) == (3, 204, 0)
    shard = opened.shard(manifest.shards["train"][0])
    for d, tokens in enumerate(TOKENS):
        assert shard.tokens_N[shard.offsets_D[d] : shard.offsets_D[d + 1]].tolist() == tokens.tolist()
    assert shard.tokens_N.dtype == np.uint16
    assert shard.sentences[shard.sentence_offsets_D[2] :].tolist() == [0, 50, 199]
    assert shard.keys_D.tolist() == [1, 2, 2**64 - 1]
    assert shard.ids.to_pylist() == ["a", "b", "c"]
    assert (Path(opened.tokenizer_folder()) / "tokenizer.json").read_bytes() == b"{}"
    assert list_names(uri) == [MANIFEST, "tokenizer/tokenizer.json", "train-00000.arrow"]
    remove(uri, "train-00000.arrow")
    remove(uri, "tokenizer")
    assert list_names(uri) == [MANIFEST]


def test_the_same_table_gives_the_same_bytes(uri: str) -> None:
    first = fill_place(uri)
    rows = table()
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    assert write_shard(uri, "train-00000.arrow", pieces) == first.shards["train"][0]
    assert fill_place(uri).fingerprint == first.fingerprint


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "x.arrow", table())
    before = pa.total_allocated_bytes()
    shard = shards.read_shard(tmp_path / "x.arrow")
    assert pa.total_allocated_bytes() - before < 1024
    assert not shard.tokens_N.flags.owndata
    assert not shard.tokens_N.flags.writeable


def test_changes_are_noticed(uri: str) -> None:
    manifest = fill_place(uri)
    entry = manifest.shards["train"][0]
    raw = bytearray(read_file(uri, entry.name) or b"")
    raw[-100] ^= 1
    write_file(uri, entry.name, bytes(raw))
    with pytest.raises(InputError, match=r"not what the manifest says \(hash\)"):
        TokenShards.open(uri).shard(entry)
    with pytest.raises(InputError, match="lacks the shard train-00009"):
        TokenShards.open(uri).shard(replace(entry, name="train-00009.arrow"))
    with pytest.raises(InputError, match="not those that this run began with"):
        TokenShards.open(uri, fingerprint="0" * 32)
    with pytest.raises(InputError, match="made with another tokenizer"):
        TokenShards.open(uri, tokenizer="xyz")
    with pytest.raises(InputError, match="nightloom prepare"):
        TokenShards.open(uri + "/elsewhere")


@pytest.mark.parametrize("raw", [b"[]", b"{", b'{"format": 1}', b'{"format": 1, "shards": {"train": [{"nam": 1}]}}'])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, raw: bytes) -> None:
    write_file(str(tmp_path), MANIFEST, raw)
    with pytest.raises(InputError, match="damaged"):
        read_manifest(str(tmp_path))


def test_another_format_is_one_line(tmp_path: Path) -> None:
    tree = json.loads(fill_place(str(tmp_path)).to_bytes())
    write_file(str(tmp_path), MANIFEST, json.dumps({**tree, "format": 99}).encode())
    with pytest.raises(InputError, match="format 99, not 1"):
        read_manifest(str(tmp_path))


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(str(tmp_path), "x", b"before")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_file(str(tmp_path), "x", b"after")
    assert read_file(str(tmp_path), "x") == b"before"
    assert os.listdir(tmp_path) == ["x"]


def test_the_cache_makes_room(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies that were made first go first; what no removal can make room for is one line."""
    for name, value in {**s3_server, "NIGHTLOOM_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://bucket/{tmp_path.name}"
    entries = [write_shard(uri, f"{n}.arrow", table()) for n in range(3)]
    opened = TokenShards(uri, replace(fill_place(uri), shards={"train": tuple(entries), "heldout": ()}))
    first = opened.shard(entries[0])
    opened.shard(entries[1])
    for age, name in enumerate(("1.arrow", "0.arrow")):
        os.utime(opened.folder / name, (age, age))
    copies = list(tmp_path.rglob("*.arrow"))
    free = iter([0, shards.SPARE_DISK_BYTES * 2])

    class Usage:
        def __init__(self, _: object) -> None:
            self.free = next(free)

    monkeypatch.setattr(shards.shutil, "disk_usage", Usage)
    opened.shard(entries[2])
    assert len(copies) == 2
    assert sorted(p.name for p in tmp_path.rglob("*.arrow")) == ["0.arrow", "2.arrow"]
    assert first.tokens_N[:3].tolist() == [5, 6, 65_535]
    free = iter([0] * 9)
    with pytest.raises(InputError, match="has no room"):
        opened.shard(ShardEntry("9.arrow", 1, 1, 1, ""))


@pytest.mark.parametrize("name", ["../../home/.profile", "/etc/passwd", "train/../../up.arrow"])
def test_a_manifest_cannot_name_files_outside_its_place(tmp_path: Path, name: str) -> None:
    """On S3 a shard is copied to its name below a cache: that must not lead anywhere else."""
    entry = {"name": name, "documents": 1, "tokens": 1, "bytes": 1, "hash": "0" * 32}
    write_file(str(tmp_path), MANIFEST, json.dumps({"format": shards.FORMAT, "shards": {"train": [entry]}}).encode())
    with pytest.raises(InputError, match="a shard cannot lie at"):
        read_manifest(str(tmp_path))
