"""The embedding table: a Lance dataset whose rows are vectors and whose metadata is the recipe.

Workers write fragments (`write_fragment`), which count for nothing until the driver commits them in one transaction
that also removes the old rows of changed documents (`commit`). Readers open the tag `published`, which moves
only when a run is complete. The table is the only checkpoint: what a killed run did not commit, the next finds missing.
"""

import json
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.fs
from lance.fragment import FragmentMetadata, write_fragments

from model.errors import InputError
from pipeline import storage
from pipeline.chunks import WHOLE
from pipeline.keys import Keys, as_keys, hash_ids, is_among
from pipeline.lease import Lease
from pipeline.nearest import search
from pipeline.packing import look_ahead
from pipeline.recipe import Recipe
from pipeline.vectors import also_array, also_column, column_type

PUBLISHED = "published"
NEXT, PAGE = "_next.lance", "_report.html"
"""Folder in which the table of a migration grows; the page that `nightloom report` writes."""
OWN_FOLDERS = ("_lease", "_runs", "_sources", "_dead.lance", "_canaries", NEXT, PAGE)
"""What we keep in a table's folder beside Lance's files. Lance leaves folders alone that it does not know."""
KEPT = "published-"
"""Begins the tags that keep versions which were published: published-12."""
EVERY_COMMIT = 2**32 - 1
"""A fragment that never was, which every commit removes: Lance refuses the later of two commits that touch the same
fragment, and would let two that only add rows pass side by side."""
RECIPE_KEY, FINGERPRINT_KEY, MODEL_KEY, RUN_KEY = (
    f"nightloom.{name}" for name in ("recipe", "fingerprint", "model", "run")
)
CHUNK_HASH = "chunk_hash"


def table_schema(
    dim: int,
    vector_type: str,
    carried: Sequence[pa.Field] = (),
    *,
    also: Sequence[str] = (),
    chunk_hash: bool = False,
) -> pa.Schema:
    """Columns of a table with vectors of length `dim`, followed by the source columns that are carried along."""
    columns = [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        *(pa.field(f"{unit}_{end}", pa.int64()) for unit in ("char", "token") for end in ("start", "end")),
        pa.field("text_hash", pa.binary(16), nullable=False),
        *([pa.field(CHUNK_HASH, pa.binary(16))] if chunk_hash else []),
        pa.field("source", pa.string()),
        pa.field("run", pa.string(), nullable=False),
        *(pa.field(also_column(name), column_type(dim, name), nullable=False) for name in also),
        pa.field("vector", column_type(dim, vector_type), nullable=False),
    ]
    names = {column.name for column in columns}
    if taken := [column.name for column in carried if column.name in names]:
        raise InputError(f"column {taken[0]!r} cannot be carried along: the table has a column of that name itself")
    return pa.schema([*columns, *carried])


class EmbeddingTable:
    """A table as one version of it was when it was opened. `commit` moves the object on to the version it made."""

    def __init__(self, uri: str, dataset: lance.LanceDataset) -> None:
        # Workers have another working directory.
        self.uri = uri if storage.is_s3(uri) else os.path.abspath(os.path.expanduser(uri))
        self.dataset = dataset
        self.lease: Lease | None = None
        """Held by the run that writes; looked at before every commit and before the tag moves."""
        metadata = {key.decode(): value.decode() for key, value in (dataset.schema.metadata or {}).items()}
        if RECIPE_KEY not in metadata:
            raise InputError(
                f"{uri} is a Lance dataset without a recipe: nightloom did not write it; name another table"
            )
        self.recipe = Recipe.from_json(metadata[RECIPE_KEY])
        self.fingerprint = metadata[FINGERPRINT_KEY]
        self.model = metadata.get(MODEL_KEY, "")

    @classmethod
    def open(cls, uri: str, version: int | str | None = None) -> "EmbeddingTable":
        """Open the newest version, or the one with this number or tag.

        Raises:
            InputError: no table there, no such version, nothing published yet, not a table of ours.
        """
        table = cls.find(uri)
        if table is None:
            raise InputError(f"there is no table at {uri}; `nightloom embed SOURCE {uri}` makes one")
        if version is None:
            return table
        if version == PUBLISHED and table.published_version() is None:
            raise InputError(f"nothing is published in {uri} yet; the run that fills it has not finished: run it again")
        try:
            return cls(uri, table.dataset.checkout_version(version))
        except (ValueError, OSError) as error:
            raise InputError(f"{uri} has no version {version!r} ({reason(error)})") from None

    @classmethod
    def find(cls, uri: str) -> "EmbeddingTable | None":
        """The newest version of the table, or None where there is none.

        Raises:
            InputError: the place cannot be read, or holds something else.
        """
        try:
            return cls(uri, lance.dataset(os.path.expanduser(uri), storage_options=storage.lance_options(uri)))
        except InputError:
            raise
        except (ValueError, OSError) as error:
            if "not found" not in str(error).lower():
                raise InputError(f"the table {uri} cannot be opened: {reason(error)}") from None
        if holds_files(uri):
            raise InputError(f"{uri} holds files but no table; name a place that is empty or does not exist yet")
        return None

    @classmethod
    def create(cls, uri: str, recipe: Recipe, *, model: str, carried: Sequence[pa.Field] = ()) -> "EmbeddingTable":
        """Make an empty table.

        Raises:
            InputError: another run made it in the meantime, or the place cannot be written.
        """
        recipe = recipe.settled()
        metadata = {RECIPE_KEY: recipe.to_json(), FINGERPRINT_KEY: recipe.fingerprint(), MODEL_KEY: model}
        alone = recipe.context == "none"  # a chunk's vector is a function of its own tokens: `pipeline.reuse`
        schema = table_schema(recipe.dim, recipe.vector_type, carried, also=recipe.also, chunk_hash=alone)
        schema = schema.with_metadata(metadata)
        options = storage.lance_options(uri)
        try:
            dataset = lance.write_dataset(
                schema.empty_table(), os.path.expanduser(uri), mode="create", storage_options=options
            )
        except OSError as error:
            raise InputError(f"the table {uri} cannot be made: {reason(error)}") from None
        return cls(uri, dataset)

    @property
    def version(self) -> int:
        return self.dataset.version

    @property
    def schema(self) -> pa.Schema:
        return self.dataset.schema

    @property
    def carried(self) -> list[str]:
        """Names of the source columns that are carried along."""
        names = self.schema.names
        return names[names.index("vector") + 1 :]

    def require(self, recipe: Recipe) -> None:
        """Refuse to mix vectors of two recipes.

        Raises:
            InputError: naming what differs.
        """
        if self.fingerprint != recipe.fingerprint():
            differs = "; ".join(self.recipe.difference(recipe)) or "its fingerprint"
            raise InputError(
                f"the table {self.uri} was written under another recipe ({differs}): "
                "use the settings it was written with, take --migrate, or name a new table"
            )

    def keys(self, fragments: Collection[int] | None = None) -> Keys:
        """The documents of this version, or of some of its fragments. Reads two columns, fragment by fragment."""
        parts = [Keys.empty()]
        for fragment in self.dataset.get_fragments():
            if fragments is not None and fragment.fragment_id not in fragments:
                continue
            rows = fragment.to_table(columns=["document_id", "text_hash"])
            # Rows of one document share id and hash: hash one of them, vectorised up to there.
            codes = rows["document_id"].combine_chunks().dictionary_encode()
            _, first = np.unique(codes.indices.to_numpy(), return_index=True)
            unique = hash_ids(codes.dictionary)
            number = np.full(len(unique), fragment.fragment_id, dtype=np.int64)
            parts.append(Keys(unique, as_keys(rows["text_hash"])[first], number))
        return Keys.join(parts)

    def fragment_groups(self, rows_per_group: int) -> list[list[int]]:
        """The ids of all fragments, dealt into groups of about so many rows."""
        fragments = self.dataset.get_fragments()
        rows = np.array([fragment.metadata.physical_rows or 0 for fragment in fragments], np.int64)
        ids = [fragment.fragment_id for fragment in fragments]
        return [ids[some] for some in look_ahead(rows, rows_per_group)]

    def commit(self, added: Iterable[str], removed: np.ndarray, keys: Keys, *, run: str) -> int:
        """Add fragments and remove documents in one transaction; both happen or neither does.

        Args:
            added: what `write_fragment` returned.
            removed: S16 id hashes of documents whose rows in earlier fragments go (changed or deleted ones).
            keys: the keys of the version that the run began with.

        Returns:
            The new version, or the current one when there is nothing to do.

        Raises:
            InputError: another run has written to the table since it was opened; nothing of this call stays in it.
        """
        if self.dataset.latest_version != self.version:
            raise self._conflict()
        new = [FragmentMetadata.from_json(text) for text in added]
        gone, updated = self._without(removed, keys.fragments_of(removed)) if len(removed) else ([], [])
        if not (new or gone or updated):
            return self.version
        self._transact(run, removed=gone, updated=updated, new=new)
        return self.version

    def replace(self, old: Sequence[int], new: Sequence[FragmentMetadata], *, run: str) -> None:
        """Put fragments in the place of others that hold the same rows.

        Raises:
            InputError: another run has written to the table since it was opened.
        """
        self._transact(run, removed=old, new=new)

    def overwrite(self, schema: pa.Schema, new: Sequence[FragmentMetadata], *, run: str) -> "EmbeddingTable":
        """Replace all rows, the schema and with it the recipe; earlier versions keep theirs.

        Args:
            new: fragments whose files lie in this table's folder.
        """
        # Without a retry: Lance would let this one pass over what another writer committed meanwhile.
        self._commit(run, lance.LanceOperation.Overwrite(schema, [*new]), max_retries=0)
        table = EmbeddingTable(self.uri, self.dataset)
        table.lease = self.lease
        return table

    def claim(self, run: str) -> None:
        """Make a version that changes nothing: whatever a writer that lost its lease has under way is refused then."""
        self._transact(run)

    def _transact(
        self,
        run: str,
        *,
        removed: Sequence[int] = (),
        updated: Sequence[FragmentMetadata] = (),
        new: Sequence[FragmentMetadata] = (),
    ) -> None:
        self._commit(
            run,
            lance.LanceOperation.Update(
                removed_fragment_ids=[*removed, EVERY_COMMIT], updated_fragments=[*updated], new_fragments=[*new]
            ),
        )

    def _commit(self, run: str, operation: Any, **how: int) -> None:
        before = self.version
        transaction = lance.Transaction(read_version=before, operation=operation, transaction_properties={RUN_KEY: run})
        if self.lease is not None:
            self.lease.check()
        try:
            options = storage.lance_options(self.uri)
            self.dataset = lance.LanceDataset.commit(self.dataset, transaction, storage_options=options, **how)
        except OSError as error:
            if "conflict" in str(error).lower():
                raise self._conflict() from None
            raise
        if self.version != before + 1:
            # Someone compacted or added rows without us in between. What we committed is whole, but what we know about
            # the table's fragments is out of date.
            raise self._conflict()

    def _conflict(self) -> InputError:
        return InputError(f"another run is writing to {self.uri}; let it finish, then run again")

    def _without(self, removed: np.ndarray, fragment_ids: set[int]) -> tuple[list[int], list[FragmentMetadata]]:
        """Delete documents from fragments; (ids of fragments with no row left, metadata of those with some left)."""
        removed = np.sort(removed)
        gone, updated = [], []
        for fragment in self.dataset.get_fragments():
            if fragment.fragment_id not in fragment_ids:
                continue
            rows = fragment.scanner(columns=["document_id"], with_row_address=True).to_table()
            addresses = rows["_rowaddr"].to_numpy()[is_among(hash_ids(rows["document_id"]), removed)]
            if not len(addresses):
                continue
            if len(addresses) == len(rows):
                gone.append(fragment.fragment_id)
                continue
            left = fragment.delete(f"_rowaddr IN ({','.join(map(str, addresses.tolist()))})")
            updated.append(left)
        return gone, updated

    def published_version(self) -> int | None:
        """The version that readers see, or None before the first run has finished."""
        tag = self.dataset.tags.list().get(PUBLISHED)
        return None if tag is None else tag["version"]

    def publish(self) -> int:
        """Let readers see this version."""
        self.show(self.version)
        return self.version

    def show(self, version: int) -> None:
        """Move the tag to a version, and keep that and the one before for going back."""
        if self.lease is not None:
            self.lease.check()
        tags = self.dataset.tags
        known = tags.list()
        current = known[PUBLISHED]["version"] if PUBLISHED in known else None
        # A run that was killed between the two may have left the current one without its tag.
        if current is not None and kept_tag(current) not in known:
            tags.create(kept_tag(current), current)
        if current is None:
            tags.create(PUBLISHED, version)
        else:
            tags.update(PUBLISHED, version)
        if version != current and kept_tag(version) not in known:
            tags.create(kept_tag(version), version)

    def kept_versions(self) -> list[int]:
        """The versions that were published and are still there, ascending."""
        tags = self.dataset.tags.list().items()
        return sorted({tag["version"] for name, tag in tags if name == PUBLISHED or name.startswith(KEPT)})

    def search(self, vector: np.ndarray, k: int) -> pa.Table:
        """The `k` rows nearest to a vector by cosine, best first; every row is compared.

        Args:
            vector: float of shape (dim,), of any length.

        Returns:
            As `pipeline.nearest.search`.
        """
        return search(self.dataset, vector, k, self.recipe.also)

    def count_documents(self) -> int:
        """Documents of this version; reads one small column. Every document has one first row."""
        first = 0 if self.recipe.granularity == "chunk" else WHOLE
        return self.dataset.count_rows(filter=f"chunk = {first}")


def write_fragment(uri: str, rows: pa.Table, run: str) -> str:
    """Write finished rows (without the column `run` and cheaper forms of the vectors) as one fragment of the table;
    runs on any worker.

    Returns:
        The fragment as JSON, for `EmbeddingTable.commit`. Until then the file counts for nothing.
    """
    dataset = lance.dataset(uri, storage_options=storage.lance_options(uri))
    schema = dataset.schema
    recipe = Recipe.from_json(schema.metadata[RECIPE_KEY.encode()])
    rows = rows.append_column("run", pa.array([run] * len(rows), pa.string()))
    stored = rows["vector"].combine_chunks()
    for name in recipe.also:
        rows = rows.append_column(also_column(name), also_array(stored, recipe.vector_type, name))
    rows = pa.table({field.name: rows[field.name].cast(field.type) for field in schema}, schema=schema)
    # One call, one fragment: a document must not be split over two files of which only one may survive.
    fragments = write_fragments(rows, dataset, mode="append", max_rows_per_file=2**31 - 1)
    if len(fragments) != 1:
        raise RuntimeError(f"{len(rows)} rows became {len(fragments)} fragments of {uri}")
    return json.dumps(fragments[0].to_json())


def kept_tag(version: int) -> str:
    return f"{KEPT}{version}"


def holds_files(uri: str) -> bool:
    """Whether anything lies at this place that is not ours, and not what is left of the making of a table."""
    files, path = storage.filesystem(uri)
    info = files.get_file_info(path)
    if info.type != pa.fs.FileType.Directory:
        return info.type == pa.fs.FileType.File
    found = files.get_file_info(pa.fs.FileSelector(path))
    if any(entry.base_name not in (*OWN_FOLDERS, "_transactions", "_versions") for entry in found):
        return True
    versions = files.get_file_info(pa.fs.FileSelector(f"{path}/_versions", allow_not_found=True))
    return any(entry.base_name.endswith(".manifest") for entry in versions)


def reason(error: Exception) -> str:
    """A library's message without the places in its source that Lance appends."""
    words = [part for part in str(error).strip().partition("\n")[0].split(", ") if ".rs:" not in part]
    return ", ".join(words) or type(error).__name__
