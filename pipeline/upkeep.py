"""Upkeep at the end of a run, under its lease: small fragments become large ones, and what nobody reads any more goes.

Killed at any moment it leaves a table that reads the same: compaction is one commit, and only files are deleted that no
version refers to. Nothing of it happens in a run that changed nothing.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import lance
from lance.fragment import FragmentMetadata, LanceFragment, write_fragments
from pyarrow.fs import FileType

from pipeline import storage
from pipeline.table import EmbeddingTable, kept_tag

log = logging.getLogger(__name__)

TARGET_BYTES = 256_000_000
"""About how large a compacted fragment is; those of half that size or more are left alone."""
MIN_FRAGMENTS = 8
"""So many small fragments are worth a rewriting: what was merged once is rewritten again only after some nights."""
MOST_DELETED = 0.3
"""A fragment that lost a greater share of its rows is rewritten, whatever its size."""
MOST_BYTES = 4_000_000_000
"""Data that one run rewrites at most; the next runs go on."""
CLOCK_STEP = timedelta(seconds=2)
"""Stores give the time of a file in whole seconds."""

Rewrite = Callable[[str, int, list[int]], str]


def compact(
    table: EmbeddingTable, run: str, *, each: Callable[[Rewrite, list[tuple[Any, ...]]], Iterable[str]] | None = None
) -> int:
    """Merge small fragments, and rewrite those with many deleted rows, in one commit.

    Rows of one group become one fragment, in their order, so that a document stays in one.

    Args:
        each: calls a function with each of some lists of arguments; by default here, one after the other.

    Returns:
        The fragments that were replaced; 0 where it was not worth it.
    """
    return rewrite_groups(table, run, groups_of(metadata_of(table)), each=each)


def metadata_of(table: EmbeddingTable) -> list[FragmentMetadata]:
    return [fragment.metadata for fragment in table.dataset.get_fragments()]


def rewrite_groups(
    table: EmbeddingTable,
    run: str,
    groups: Sequence[Sequence[FragmentMetadata]],
    *,
    each: Callable[[Rewrite, list[tuple[Any, ...]]], Iterable[str]] | None = None,
) -> int:
    """Make one fragment of the live rows of each group, in one commit; how many fragments were replaced."""
    if not groups:
        return 0
    calls = [(table.uri, table.version, [fragment.id for fragment in group]) for group in groups]
    new = [FragmentMetadata.from_json(text) for text in (each or one_by_one)(rewrite, calls)]
    expected = [sum(fragment.num_rows for fragment in group) for group in groups]
    if [fragment.num_rows for fragment in new] != expected:
        raise RuntimeError(f"compaction of {table.uri} would lose rows: {expected} became {new}")
    replaced = [fragment.id for group in groups for fragment in group]
    table.replace(replaced, new, run=run)
    log.info("version %d: %d fragments became %d", table.version, len(replaced), len(new))
    return len(replaced)


def groups_of(fragments: Iterable[FragmentMetadata]) -> list[list[FragmentMetadata]]:
    """Which fragments are to become one, each group about TARGET_BYTES, all together at most MOST_BYTES."""
    loose = [f for f in fragments if live_bytes(f) < TARGET_BYTES / 2 or is_holey(f)]
    groups: list[list[FragmentMetadata]] = [[]]
    size = total = 0
    for fragment in loose:
        if total >= MOST_BYTES:
            break
        groups[-1].append(fragment)
        size += live_bytes(fragment)
        total += live_bytes(fragment)
        if size >= TARGET_BYTES:
            groups.append([])
            size = 0
    return [group for group in groups if len(group) >= MIN_FRAGMENTS or any(is_holey(f) for f in group)]


def live_bytes(fragment: FragmentMetadata) -> int:
    size = sum(file.file_size_bytes or 0 for file in fragment.files)
    return size * fragment.num_rows // max(fragment.physical_rows, 1)


def is_holey(fragment: FragmentMetadata) -> bool:
    return fragment.num_deletions > MOST_DELETED * fragment.physical_rows


def one_by_one(function: Rewrite, calls: list[tuple[Any, ...]]) -> Iterator[str]:
    return (function(*call) for call in calls)


def rewrite(uri: str, version: int, fragment_ids: list[int]) -> str:
    """Write the live rows of some fragments as one new fragment, batch by batch; runs on any worker.

    Returns:
        The fragment as JSON; it counts for nothing until it is committed.
    """
    dataset = lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
    old = [LanceFragment(dataset, number) for number in fragment_ids]
    rows = dataset.scanner(fragments=old).to_reader()
    new = write_fragments(rows, dataset, mode="append", max_rows_per_file=2**31 - 1)
    if len(new) != 1:
        raise RuntimeError(f"{len(fragment_ids)} fragments of {uri} became {len(new)}")
    return json.dumps(new[0].to_json())


def clean_up(table: EmbeddingTable, *, keep_versions: int) -> tuple[int, int]:
    """Drop versions that readers cannot reach, and files that belong to none.

    The newest version, the one that readers see and the `keep_versions` that were published last stay.

    Returns:
        (versions dropped, orphaned files deleted).
    """
    assert table.lease is not None, "only the one writer may delete"
    published = table.published_version()
    for version in table.kept_versions()[:-keep_versions]:
        if version != published:
            table.dataset.tags.delete(kept_tag(version))
    table.lease.check()
    before = table.dataset.cleanup_old_versions(retain_versions=1, error_if_tagged_old_versions=False)
    orphans = orphaned_files(table, table.lease.taken)
    table.lease.check()
    files, path = storage.filesystem(table.uri)
    for name in orphans:
        if files.get_file_info(f"{path}/{name}").type == FileType.File:
            files.delete_file(f"{path}/{name}")
    if orphans:
        log.info("%d files of runs that were cut off are deleted", len(orphans))
    return before.old_versions, len(orphans)


def orphaned_files(table: EmbeddingTable, before: datetime) -> list[str]:
    """Data and deletion files, older than a time of the store's own clock, that no version refers to.

    This run's workers, and those of one that may have taken over, write younger ones.
    """
    used: set[str] = set()
    for batch in table.dataset.tracked_files():
        used.update(batch["path"].to_pylist())
    found = []
    for batch in table.dataset.all_files():
        for name, modified in zip(batch["path"].to_pylist(), batch["last_modified"].to_pylist(), strict=True):
            of_rows = name.startswith(("data/", "_deletions/"))
            if of_rows and name not in used and modified.astimezone(UTC) < before - CLOCK_STEP:
                found.append(name)
    return found
