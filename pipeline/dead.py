"""Dead letters: the documents that could not be embedded, beside the table, so that they are not tried every night.

A Lance dataset in the table's folder with one row for each such document. It is written just before the commit that it
belongs to: a crash between the two leaves a document without a letter, which the next run tries again, and never a
letter for a document that the table holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.errors import InputError
from pipeline import storage
from pipeline.keys import KEY, Keys, as_keys, hash_ids, is_among
from pipeline.table import EmbeddingTable, reason

FOLDER = "_dead.lance"
"""In the table's folder. Lance leaves folders alone that it does not know."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("document_id", pa.string()),
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("source", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("first_run", pa.string(), nullable=False),
        pa.field("last_run", pa.string(), nullable=False),
    ]
)
IDENTITY = ["key", "fingerprint"]
SHOWN = [name for name in SCHEMA.names if name not in IDENTITY]
UNKNOWN_TEXT = bytes(16)
"""In place of the hash of a text that could not be read: no text has it, so such a row is looked at by every run."""
KEEP_VERSIONS = timedelta(hours=1)
"""Someone may be reading the list."""


@dataclass(frozen=True, slots=True)
class Dead:
    """A document that could not be embedded, and why."""

    key: bytes
    """16 bytes, the hash of its id."""
    document_id: str | None
    """None where only the hash is known."""
    source: str
    stage: str
    """read (its row cannot be read), tokens, embed, or quarantine (it killed its worker)."""
    error: str
    text_hash: bytes = UNKNOWN_TEXT
    attempts: int = 1
    """How often it was tried."""

    @classmethod
    def named(cls, document_id: str, source: str, stage: str, error: str, **more: Any) -> "Dead":
        """A dead document whose id is known."""
        key = hash_ids(pa.array([document_id], pa.string())).tobytes()
        return cls(key, document_id, source, stage, error, **more)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Dead":
        """A dead document as a worker or the survey describes it; `text_hash`, where it is there, in hexadecimal."""
        given = {name: row[name] for name in ("attempts",) if name in row}
        if "text_hash" in row:
            given["text_hash"] = bytes.fromhex(row["text_hash"])
        return cls.named(row["document_id"], row["source"], row["stage"], row["error"], **given)

    def shown(self) -> dict[str, Any]:
        """What the record of a run says of it."""
        return {name: getattr(self, name) for name in ("document_id", "source", "stage", "error", "attempts")}


class DeadLetters:
    """The dead letters of a table under one recipe; only the run that writes to the table changes them.

    Letters of other recipes stay where they are and are not seen.

    Raises:
        InputError: the letters cannot be read.
    """

    def __init__(self, table: EmbeddingTable) -> None:
        self.uri, self.fingerprint = f"{table.uri.rstrip('/')}/{FOLDER}", table.fingerprint
        self.table = table
        self.dataset = find(self.uri)
        self.changed = False
        self._load()

    def _load(self) -> None:
        """Take the columns that a run needs into memory: about 100 bytes a letter."""
        rows = self._rows(["key", "text_hash", "source", "error", "attempts", "first_run"]).sort_by("key")
        self.rows = rows.combine_chunks()
        self.ids = as_keys(self.rows["key"]) if len(rows) else np.empty(0, KEY)

    def _rows(self, columns: Sequence[str]) -> pa.Table:
        if self.dataset is None:
            return SCHEMA.empty_table().select(columns)
        return self.dataset.to_table(columns=columns, filter=f"fingerprint = '{self.fingerprint}'")

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> Keys:
        """Which text of which document died."""
        hashes = as_keys(self.rows["text_hash"]) if len(self) else np.empty(0, KEY)
        return Keys(self.ids, hashes, np.zeros(len(self), np.int64))

    def known(self, ids: np.ndarray) -> np.ndarray:
        """For each of `ids` (S16) whether that document has a letter."""
        return is_among(ids, self.ids)

    def record(self, dead: Iterable[Dead], run: str) -> None:
        """Write a letter for each; one that tells of the same text has its attempts added up.

        A row that cannot be read and says so again in the same words is left as it is: reading it is no attempt.
        """
        latest = {letter.key: letter for letter in dead}
        keys = np.frombuffer(b"".join(latest), KEY)
        at = np.searchsorted(self.ids, keys)
        rows = []
        for letter, place, known in zip(latest.values(), at.tolist(), self.known(keys).tolist(), strict=True):
            before = self.rows.slice(place, 1).to_pylist()[0] if known else {}
            again = before.get("text_hash") == letter.text_hash
            unread = again and letter.text_hash == UNKNOWN_TEXT
            if unread and (before["error"], before["source"]) == (letter.error, letter.source):
                continue
            rows.append(
                {
                    **{name: getattr(letter, name) for name in ("key", "document_id", "text_hash", "source", "stage")},
                    "error": letter.error,
                    "fingerprint": self.fingerprint,
                    "attempts": letter.attempts + (before["attempts"] if again else 0),
                    "first_run": before["first_run"] if again else run,
                    "last_run": run,
                }
            )
        if not rows:
            return
        self._write(pa.Table.from_pylist(rows, schema=SCHEMA))

    def adopt(self, other: "DeadLetters") -> None:
        """Take over the letters of another table, under its recipe; those that are here already stay single."""
        rows = other._rows(SCHEMA.names)
        if len(rows):
            self._write(rows)

    def _write(self, letters: pa.Table) -> None:
        self._about_to_change()
        if self.dataset is None:
            options = storage.lance_options(self.uri)
            self.dataset = lance.write_dataset(letters, self.uri, mode="create", storage_options=options)
        else:
            merge = self.dataset.merge_insert(IDENTITY).when_matched_update_all().when_not_matched_insert_all()
            merge.execute(letters)
        self._load()

    def remove(self, ids: np.ndarray) -> None:
        """Drop the letters of these documents (S16); those that have none are passed over."""
        gone = ids[self.known(ids)]
        if self.dataset is None or not len(gone):
            return
        keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(gone), [None, pa.py_buffer(gone.tobytes())])
        names = pa.array([self.fingerprint] * len(gone), pa.string())
        schema = pa.schema([SCHEMA.field(name) for name in IDENTITY])
        self._about_to_change()
        self.dataset.merge_insert(IDENTITY).when_matched_delete().execute(pa.table([keys, names], schema=schema))
        self._load()

    def _about_to_change(self) -> None:
        self.changed = True
        if self.table.lease is not None:
            self.table.lease.check()

    def outdated(self, still: np.ndarray, seen: np.ndarray, sources: Iterable[str], *, complete: bool) -> np.ndarray:
        """The letters (S16) that tell of nothing any more.

        Args:
            still: S16, documents that are dead at the end of this run.
            seen: S16, documents with a letter that the run came across.
            sources: paths of the files that it read.
            complete: whether what is in none of them is gone.
        """
        still, seen = np.sort(still), np.sort(seen)
        read = pc.is_in(self.rows["source"], pa.array(sorted(sources), pa.string()))
        met = read.to_numpy() | is_among(self.ids, seen) | complete
        return self.ids[met & ~is_among(self.ids, still)]

    def tidy(self) -> None:
        """Fold the small pieces that this run made, if it changed anything."""
        if self.dataset is None or not self.changed:
            return
        if len(self.dataset.get_fragments()) > 1:
            self.dataset.optimize.compact_files()
        self.dataset.cleanup_old_versions(older_than=KEEP_VERSIONS)


def find(uri: str) -> lance.LanceDataset | None:
    """The dataset of letters, or None where none was ever written.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return lance.dataset(uri, storage_options=storage.lance_options(uri))
    except (ValueError, OSError) as error:
        if "not found" not in str(error).lower():
            raise InputError(f"the dead letters {uri} cannot be read: {reason(error)}") from None
        return None


def list_letters(table: EmbeddingTable) -> list[dict[str, Any]]:
    """All letters under a table's recipe, sorted by source and id; hashes as hexadecimal digits."""
    rows = DeadLetters(table)._rows(SHOWN).sort_by([("source", "ascending"), ("document_id", "ascending")])
    return [{**row, "text_hash": row["text_hash"].hex()} for row in rows.to_pylist()]
