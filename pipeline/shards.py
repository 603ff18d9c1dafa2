"""Token shards: what training reads. Arrow IPC files without compression, so that they are read by memory map, and a
manifest that says what they are.

The manifest is written last and names every shard with its hash: a place without one holds nothing, and a shard that
was changed since is noticed when it is opened. Shards on S3 are copied to a local cache, once for each machine.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from model.errors import InputError
from pipeline.storage import cache_folder, filesystem, first_words, is_s3

FORMAT = 1
MANIFEST = "manifest.json"
TRAIN, HELD_OUT_SPLIT = "train", "heldout"
SPARE_DISK_BYTES = 1 << 30
"""What the cache leaves free: other processes write on the same disk."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard, as the manifest has it."""

    name: str
    documents: int
    tokens: int
    bytes: int
    hash: str
    """blake2b-128 of the file, in hex."""

    def __post_init__(self) -> None:
        # Names come out of a file, and copies are written under them.
        if self.name.startswith("/") or ".." in self.name.split("/"):
            raise ValueError(f"a shard cannot lie at {self.name!r}")


@dataclass(frozen=True)
class Manifest:
    """What a place with token shards says of itself."""

    tokenizer: str
    """The hash of tokenizer.json, as `model.folder.tokenizer_hash` has it."""
    vocab_size: int
    """The largest id and one; a model needs at least so many rows."""
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    unk_id: int
    special_ids: tuple[int, ...]
    """All of these, and every other token that the tokenizer calls special."""
    corpus: str
    """A hash of the documents and of the settings that the shards were made with."""
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    """Documents read, by what became of them."""
    lengths: Mapping[str, Mapping[str, int]]
    """Split -> how many documents have up to so many tokens, in powers of two: "128" counts those of 65 to 128."""
    shards: Mapping[str, tuple[ShardEntry, ...]]
    """Split -> its shards: "train" and "heldout"."""
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all of it, the shards' hashes included: what a checkpoint remembers."""
        return hash_bytes(self.to_bytes())

    def num_tokens(self, split: str = TRAIN) -> int:
        return sum(entry.tokens for entry in self.shards[split])

    def num_documents(self, split: str = TRAIN) -> int:
        return sum(entry.documents for entry in self.shards[split])


def hash_bytes(data: bytes | memoryview | pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of a place; None where there is none.

    Raises:
        InputError: it cannot be read, or is of another version of nightloom.
    """
    raw = read_file(uri, MANIFEST)
    if raw is None:
        return None
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            raise InputError(f"{uri} holds token shards of format {tree['format']}, not {FORMAT}; prepare them again")
        tree["shards"] = {s: tuple(ShardEntry(**entry) for entry in entries) for s, entries in tree["shards"].items()}
        return Manifest(**{**tree, "special_ids": tuple(tree["special_ids"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri}/{MANIFEST} is damaged ({first_words(error)}); prepare the tokens again") from None


def read_file(uri: str, name: str) -> bytes | None:
    """A file of a place, whole; None where it is missing.

    Raises:
        InputError: it is there and cannot be read.
    """
    try:
        files, path = filesystem(uri)
        with files.open_input_stream(f"{path}/{name}") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri}/{name} cannot be read: {first_words(error)}") from None


def write_file(uri: str, name: str, data: bytes | pa.Buffer) -> None:
    """A file of a place, whole or not at all: renamed when complete on a disk; an object is put at once anyway."""
    files, path = filesystem(uri)
    target = f"{path}/{name}"
    if not isinstance(files, LocalFileSystem):
        with files.open_output_stream(target) as stream:
            stream.write(data)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(target), prefix=".", delete=False) as partial:
        try:
            partial.write(data)
            partial.flush()
            os.fsync(partial.fileno())
            os.chmod(partial.name, 0o644)
            os.replace(partial.name, target)
        except BaseException:
            os.unlink(partial.name)
            raise


def list_names(uri: str) -> list[str]:
    """The files of a place, those in its folders too, by their path below it, sorted."""
    files, path = filesystem(uri)
    found = files.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    return sorted(info.path.removeprefix(path).lstrip("/") for info in found if info.type == FileType.File)


def remove(uri: str, name: str) -> None:
    """Remove a file of a place, or a folder with all that is in it."""
    files, path = filesystem(uri)
    target = files.get_file_info(f"{path}/{name}")
    if target.type == FileType.Directory:
        files.delete_dir(target.path)
    else:
        files.delete_file(target.path)


# Shards


@dataclass(frozen=True, slots=True)
class Shard:
    """An open shard of D documents; its arrays are views of the mapped file."""

    keys_D: np.ndarray
    """uint64: half of the hash of each document's text."""
    offsets_D: np.ndarray
    """int32, D + 1: document d is tokens_N[offsets_D[d]:offsets_D[d + 1]]."""
    tokens_N: np.ndarray
    """uint16 or int32, without [CLS] and [SEP]."""
    sentence_offsets_D: np.ndarray
    sentences: np.ndarray
    """int32: where sentences begin, in tokens of their document; its first is 0. Laid out like the tokens."""
    ids: pa.Array
    """The documents' ids, for people."""


def shard_table(ids: pa.Array, keys_D: np.ndarray, tokens: pa.ListArray, sentences: pa.ListArray) -> pa.Table:
    return pa.table(
        {"document_id": ids, "key": pa.array(keys_D, pa.uint64()), "tokens": tokens, "sentences": sentences}
    )


def write_shard(uri: str, name: str, table: pa.Table) -> ShardEntry:
    """Write one shard; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    data = sink.getvalue()
    write_file(uri, name, data)
    tokens = sum(len(chunk.flatten()) for chunk in table["tokens"].chunks)
    return ShardEntry(name, len(table), tokens, data.size, hash_bytes(data))


def read_shard(path: str | os.PathLike[str]) -> Shard:
    """Map a shard that lies on a local disk."""
    batch = pa.ipc.open_file(pa.memory_map(os.fspath(path))).get_batch(0)
    tokens, sentences = batch["tokens"], batch["sentences"]
    return Shard(
        batch["key"].to_numpy(),
        tokens.offsets.to_numpy(),
        tokens.values.to_numpy(),
        sentences.offsets.to_numpy(),
        sentences.values.to_numpy(),
        batch["document_id"],
    )


class TokenShards:
    """A place that `nightloom prepare` has filled; see `open`."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri, self.manifest = uri.rstrip("/"), manifest
        # Nothing in the cache is ever replaced: what belongs to another manifest lies in another folder.
        self.folder = cache_folder("tokens") / manifest.fingerprint if is_s3(uri) else Path(filesystem(uri)[1])
        self.checked: set[str] = set()

    @classmethod
    def open(cls, uri: str, *, tokenizer: str | None = None, fingerprint: str | None = None) -> "TokenShards":
        """Open a place with token shards, local or s3://.

        Args:
            tokenizer: the hash that its tokenizer must have, where a model is trained further.
            fingerprint: the manifest's, where a run is resumed.

        Raises:
            InputError: nothing there, of another tokenizer, or not what it was.
        """
        manifest = read_manifest(uri)
        if manifest is None:
            raise InputError(f"{uri} holds no token shards (no {MANIFEST}); fill it with `nightloom prepare`")
        if tokenizer is not None and manifest.tokenizer != tokenizer:
            raise InputError(
                f"the token shards in {uri} were made with another tokenizer ({manifest.tokenizer[:12]}) than the "
                f"model's ({tokenizer[:12]}); prepare them with --tokenizer and the model's folder"
            )
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise InputError(
                f"the token shards in {uri} are not those that this run began with (manifest "
                f"{manifest.fingerprint[:12]}, not {fingerprint[:12]}); restore them, or begin a new run"
            )
        return cls(uri, manifest)

    def tokenizer_folder(self) -> str:
        """A local folder with the tokenizer's files."""
        if is_s3(self.uri):
            names = [name for name in list_names(self.uri) if name.startswith("tokenizer/")]
            for name in names:
                if not (self.folder / name).exists():
                    write_file(str(self.folder), name, read_file(self.uri, name) or b"")
        return str(self.folder / "tokenizer")

    def shard(self, entry: ShardEntry) -> Shard:
        """Map one shard, after comparing it with its hash when this process opens it for the first time.

        Raises:
            InputError: missing, changed, or no room for it in the cache.
        """
        path = self.folder / entry.name
        if is_s3(self.uri) and not path.exists():
            self._fetch(entry, path)
        if entry.name not in self.checked:
            try:
                with pa.memory_map(str(path)) as mapped:
                    found = hash_bytes(mapped.read_buffer())
            except FileNotFoundError:
                raise InputError(f"{self.uri} lacks the shard {entry.name}; restore it, or prepare again") from None
            if found != entry.hash:
                raise InputError(f"the shard {path} is not what the manifest says (hash); restore it, or prepare again")
            self.checked.add(entry.name)
        return read_shard(path)

    def _fetch(self, entry: ShardEntry, path: Path) -> None:
        """Copy a shard into the cache. Copies that others have mapped stay readable when they are removed here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        root = cache_folder("tokens")
        old = sorted(root.rglob("*.arrow"), key=lambda file: file.stat().st_mtime)
        while shutil.disk_usage(root).free < entry.bytes + SPARE_DISK_BYTES:
            if not old:
                raise InputError(f"{root} has no room for {entry.bytes:,} bytes; set NIGHTLOOM_CACHE to another disk")
            old.pop(0).unlink(missing_ok=True)
        data = read_file(self.uri, entry.name)
        if data is None:
            raise InputError(f"{self.uri} lacks the shard {entry.name}; restore it, or prepare again")
        write_file(str(path.parent), path.name, data)
