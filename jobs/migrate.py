"""`nightloom embed --migrate`: a table goes over to another recipe, in as many nights as it takes, at once for readers.

The new vectors grow in a table of their own in the old one's folder, by ordinary runs: survey, commits, dead letters,
gates and limits are theirs. When such a run has published that table, its files are linked into the old one's folder
(copied, within a store), one commit replaces the content of the table, and the tag moves. Until then readers see the
old vectors, and nightly runs of the old recipe go on. Going back is a rollback: old versions keep their own recipe.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from jobs.configuration import EmbedConfiguration
from jobs.embed import run_embed
from jobs.plan import make_recipe, pinned, read_model
from jobs.report import EmbedReport
from model.errors import InputError
from pipeline import storage
from pipeline.dead import DeadLetters
from pipeline.lease import Lease
from pipeline.ledger import new_run, recorded
from pipeline.table import NEXT, EmbeddingTable
from pipeline.upkeep import metadata_of, rewrite_groups

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Other runs may change the table while its migration is completed; so often what they brought is embedded too."""


def run_migrate(configuration: EmbedConfiguration, **how: Any) -> EmbedReport:
    """Go on with a migration; once all is embedded, let readers see it. Where there is nothing to migrate, embed.

    Args:
        how: further arguments of `run_embed`.

    Raises:
        InputError: as `run_embed`; or a migration to a third recipe is under way.
    """
    uri, configuration = configuration.table, pinned(configuration)
    table, model = EmbeddingTable.find(uri), read_model(configuration)
    if table is None or not differs(configuration, table):
        report = run_embed(configuration, **how)
        if table is not None:
            clear_away(table)
        return report
    under_way = EmbeddingTable.find(next_uri(uri))
    if under_way is not None and differs(configuration, under_way):
        vectors = configuration.vectors
        dtype = under_way.recipe.dtype if vectors.dtype == "auto" else vectors.dtype
        recipe = make_recipe(model, vectors, dtype=dtype)
        raise InputError(
            f"a migration of {uri} to another recipe is under way ({'; '.join(under_way.recipe.difference(recipe))}): "
            f"finish it with its own settings, or remove {under_way.uri} to give it up"
        )
    grow = configuration.model_copy(update={"table": next_uri(table.uri)})
    for _ in range(ATTEMPTS):
        since = EmbeddingTable.open(uri).version
        report = run_embed(grow, **how)
        if report.status not in ("published", "unchanged") or report.published != report.version or report.left:
            break
        if version := switch(table.uri, since):
            return replace(report, status="published", table=table.uri, version=version, published=version)
        log.warning("another run has changed %s since the source was read: what is new is embedded too", uri)
        how.pop("run", None)  # every run has a name of its own
    else:
        report = replace(report, status="partial")
    log.warning("readers of %s go on with the old vectors until the migration is complete", table.uri)
    return replace(report, table=table.uri, version=table.version, published=table.published_version())


def next_uri(uri: str) -> str:
    """Where the table of a migration grows."""
    return f"{uri.rstrip('/')}/{NEXT}"


def differs(configuration: EmbedConfiguration, table: EmbeddingTable) -> bool:
    """Whether the configuration stands for another recipe than the table's."""
    vectors = configuration.vectors
    dtype = table.recipe.dtype if vectors.dtype == "auto" else vectors.dtype
    recipe = make_recipe(read_model(configuration), vectors, dtype=dtype)
    return recipe.fingerprint() != table.fingerprint


def switch(uri: str, since: int | None = None) -> int | None:
    """Replace the content of a table by that of its complete migration, and let readers see it.

    Killed before the commit it leaves files that no version names; killed after it, the next run publishes.

    Args:
        since: the table's version before the migration last read the source. What another run has published after it
            may be missing from the migration.

    Returns:
        The version that readers see; None, and nothing is changed, where the table has another version than `since`.

    Raises:
        InputError: another run is writing to the table.
    """
    run = new_run()
    with Lease.take(uri, run) as lease:
        table = EmbeddingTable.open(uri)
        if since is not None and table.version != since:
            return None
        with Lease.take(next_uri(uri), run) as lease_of_grown, recorded(uri, run, "migrate") as entry:
            grown = EmbeddingTable.open(next_uri(uri))
            table.lease, grown.lease = lease, lease_of_grown
            entry.set(
                recipe=asdict(grown.recipe),
                fingerprint=grown.fingerprint,
                version_before=table.version,
                published_before=table.published_version(),
            )
            # A deletion is named after its fragment, and fragments get new numbers: so the deleted rows go for good.
            # Each of these fragments stays as large as it was, and the others are not touched.
            rewrite_groups(grown, run, [[f] for f in metadata_of(grown) if f.deletion_file])
            fragments = metadata_of(grown)
            assert not any(fragment.deletion_file for fragment in fragments)
            bring([file.path for fragment in fragments for file in fragment.files], grown.uri, table.uri)
            bring_folder("_canaries", grown.uri, table.uri)
            DeadLetters(table).adopt(DeadLetters(grown))
            table = table.overwrite(grown.schema, fragments, run=run)
            version = table.publish()
            entry.set(status="published", version=version, published=version, rows=table.dataset.count_rows())
        discard(uri)
    return version


def clear_away(table: EmbeddingTable) -> None:
    """Remove what a migration to this table's recipe left that was killed after the switch; nothing of any other."""
    place = next_uri(table.uri)
    files, path = storage.filesystem(place)
    if files.get_file_info(path).type != FileType.Directory:
        return
    try:
        left = EmbeddingTable.find(place)
    except InputError:
        left = None  # its removal was cut off
    if left is not None and left.fingerprint != table.fingerprint:
        log.warning("a migration of %s to another recipe lies at %s and is left alone", table.uri, place)
        return
    try:
        Lease.take(place, new_run()).release()
    except InputError as error:
        log.warning("%s; %s is left alone", error, place)
        return
    discard(table.uri)


def bring(names: list[str], source: str, target: str, folder: str = "data") -> None:
    """Link, or copy within a store, files of one table into the folder of another."""
    files, origin = storage.filesystem(source)
    destination = storage.filesystem(target)[1]
    if isinstance(files, LocalFileSystem):
        files.create_dir(f"{destination}/{folder}", recursive=True)

    def one(name: str) -> None:
        link_or_copy(files, f"{origin}/{folder}/{name}", f"{destination}/{folder}/{name}")

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, names))


def link_or_copy(files: FileSystem, origin: str, destination: str) -> None:
    if isinstance(files, LocalFileSystem):
        try:
            os.link(origin, destination)
            return
        except FileExistsError:
            return  # a switch that was killed brought it
        except OSError:  # a file system without links
            pass
    files.copy_file(origin, destination)


def bring_folder(folder: str, source: str, target: str) -> None:
    """The same for all files of one of our own folders, where it exists."""
    files, origin = storage.filesystem(source)
    selector = FileSelector(f"{origin}/{folder}", allow_not_found=True)
    bring([i.base_name for i in files.get_file_info(selector) if i.type == FileType.File], source, target, folder)


def discard(uri: str) -> None:
    """Remove the table of a migration, if there is one."""
    files, path = storage.filesystem(next_uri(uri))
    if files.get_file_info(path).type == FileType.Directory:
        files.delete_dir(path)
