"""Whether readers may see what a run has done: not while too many documents are dead, and not past a gate that refuses.

Nothing is lost when they may not: what was committed stays, the next run looks at it again, and publishes it when the
reason is gone.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.configuration import EmbedConfiguration
from jobs.plan import Corpus
from pipeline.apply import Applied
from pipeline.dead import Dead, DeadLetters
from pipeline.gates import check_vectors
from pipeline.keys import KEY
from pipeline.ledger import rolled_back
from pipeline.table import EmbeddingTable

log = logging.getLogger(__name__)

ALWAYS_TOLERATED = 10
"""Dead documents that a share of the corpus never goes below: one broken line of fifty must not stop a night."""


@dataclass(slots=True)
class Publication:
    """What became of this version."""

    status: str
    """published; unchanged: readers see it already, or a rollback took it back; unpublished: for `reasons`."""
    reasons: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    """What the gates saw, for the record of the run."""


def most_dead(setting: int | float, read: int) -> int:
    """How many documents may be dead: `setting` itself, or, below 1, that share of those `read`."""
    if isinstance(setting, int) or setting == 0:
        return int(setting)
    return max(ALWAYS_TOLERATED, int(setting * read))


def publish(
    configuration: EmbedConfiguration,
    table: EmbeddingTable,
    applied: Applied,
    *,
    dead: int,
    read: int,
    run: str,
    compact: Callable[[], Any],
) -> Publication:
    """Let readers see the newest version, if nothing speaks against it.

    Documents with a bad vector are taken out of the newest version; see `pipeline.gates.check_vectors`.

    Args:
        dead: documents that could not be embedded, of those `read`.
        compact: called before the tag moves.
    """
    reasons = [applied.refused] if applied.refused else []
    most = most_dead(configuration.max_dead, read)
    if dead > most:
        reasons.append(
            f"max_dead: {dead} of {read} documents are dead, at most {most} may be; "
            f"`nightloom dead {configuration.table}` lists them"
        )
    measured: dict[str, Any] = {"max_dead": {"dead": dead, "most": most}, **applied.probed}
    published = table.published_version()
    taken_back = published is not None and published != table.version and is_rolled_back(table, published)
    if published != table.version and not taken_back:
        verdict = check_vectors(table, configuration.gates.off, run=run)
        measured["vectors"] = verdict.measured
        reasons += verdict.refused
    if reasons:
        for reason in reasons:
            log.error("not published: %s", reason)
        return Publication("unpublished", reasons, measured)
    if published == table.version or taken_back:
        return Publication("unchanged", [], measured)
    compact()
    table.publish()
    return Publication("published", [], measured)


def is_rolled_back(table: EmbeddingTable, published: int) -> bool:
    """Whether a rollback took the newest version from readers; said to the user, who may not remember."""
    if not rolled_back(table.uri, table.version, published):
        return False
    log.warning(
        "readers stay at version %s, where a rollback put them, until a run changes the table; "
        "`nightloom rollback %s %d` shows the newest again",
        published,
        table.uri,
        table.version,
    )
    return True


def settle_letters(table: EmbeddingTable, corpus: Corpus, applied: Applied, *, complete: bool, run: str) -> None:
    """Bring the dead letters up to date at the end of a run: rows that cannot be read come, what is over goes.

    Args:
        complete: whether documents that the source does not hold are gone.
    """
    letters = DeadLetters(table)
    unread = [Dead.from_row(row) for row in corpus.plan.dead]
    letters.record(unread, run)
    dead = b"".join([letter.key for letter in unread] + list(applied.dead))
    still = np.concatenate([np.frombuffer(dead, KEY), corpus.plan.buried])
    paths = [file.path for file in corpus.files]
    letters.remove(letters.outdated(still, corpus.plan.seen, paths, complete=complete))
    letters.tidy()
