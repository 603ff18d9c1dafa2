"""Quarantine: a document that kills its worker is found, set aside, and everything beside it is embedded.

Ray starts a killed task again, without limit and without saying so. What was tried is therefore remembered outside the
workers, in an actor beside the driver (`Watch`). A table whose worker died is gone through document by document the
next time: a document that was alone when its worker died, twice, is given up. With k such documents a table costs
2 k + 1 workers. Twice, because machines go away for other reasons too.
"""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

MOST_DEATHS_ALONE = 2
"""Workers that one document may kill."""
MOST_DEATHS_TOGETHER = 8
"""Workers that one table may lose while no document is alone in them; then it is not a document that kills."""
MOST_QUARANTINED = 50
"""Documents that a run gives up; beyond, it is the machine or the model that is broken."""
MOST_STARTS = 8
"""Workers in a row, beside those that may start at the same time, that may die while they load the model."""

QUARANTINED = f"killed its worker {MOST_DEATHS_ALONE} times"

Result = TypeVar("Result")


class Watch:
    """What was begun, and what was never heard of again. A Ray actor beside the driver; see `start_watch`."""

    def __init__(self, workers: int) -> None:
        self.most_starts = MOST_STARTS + workers
        self.starts = 0
        self.begun: dict[bytes, bytes | None] = {}
        """Tables that a worker has; with the document that is alone in it, where one is."""
        self.died_together: dict[bytes, int] = {}
        self.careful: set[bytes] = set()
        self.died_alone: dict[bytes, int] = {}
        self.tokens: dict[bytes, int] = {}
        """What each table that was begun holds."""
        self.wasted_tokens = 0
        """Of tables that were begun again, whether their worker died or their result was lost with its machine."""

    def start(self) -> None:
        """A worker begins to load the model.

        Raises:
            RuntimeError: many have begun so, and none of them got to its first table.
        """
        self.starts += 1
        if self.starts > self.most_starts:
            raise RuntimeError(
                f"{self.starts - 1} workers died one after the other while they loaded the model: is memory too small?"
            )

    def begin(self, table: bytes, tokens: int = 0) -> bool:
        """A worker takes a table of so many tokens; returns whether to go through it document by document.

        Raises:
            RuntimeError: it killed too many workers, and none of its documents does so alone.
        """
        self.starts = 0
        self.wasted_tokens += self.tokens.get(table, 0)
        self.tokens[table] = tokens
        if table in self.begun:
            self.careful.add(table)
            document = self.begun[table]
            if document is not None:
                self.died_alone[document] = self.died_alone.get(document, 0) + 1
            else:
                self.died_together[table] = self.died_together.get(table, 0) + 1
        if self.died_together.get(table, 0) > MOST_DEATHS_TOGETHER:
            raise RuntimeError(
                f"a unit of work killed its worker {self.died_together[table]} times, and no document of it does so "
                "alone: is memory too small? lower compute.block_chars or compute.tokens_per_batch"
            )
        self.begun[table] = None
        return table in self.careful

    def alone(self, table: bytes, document: bytes | None) -> int:
        """A worker goes on to this document alone (None: to all together); returns how many workers it has killed.

        Raises:
            RuntimeError: too many documents kill their worker.
        """
        self.begun[table] = document
        quarantined = sum(deaths >= MOST_DEATHS_ALONE for deaths in self.died_alone.values())
        if quarantined > MOST_QUARANTINED:
            raise RuntimeError(f"{quarantined} documents killed their worker: the machine or the model is broken")
        return self.died_alone.get(document, 0) if document is not None else 0

    def end(self, table: bytes) -> None:
        """A worker is done with a table."""
        self.begun.pop(table, None)

    def wasted(self) -> int:
        """Tokens that were encoded for nothing, at most: how far a worker had come when it died is not known.

        Tables that were begun and not ended count: asked when a run is over, it will not come to them again.
        """
        return self.wasted_tokens + sum(self.tokens[table] for table in self.begun)


def start_watch(workers: int) -> Any:
    """A `Watch` that lives on this machine for as long as the driver holds what this returns. Needs a Ray session."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Watch).options(num_cpus=0, scheduling_strategy=here).remote(workers)


def num_tokens(table: pa.Table) -> int:
    """Tokens of a token table; 0 for documents that have none yet."""
    return pc.sum(pc.list_value_length(table["tokens"])).as_py() or 0 if "tokens" in table.column_names else 0


class Guard:
    """A worker's side of the watch.

    Args:
        watch: from `start_watch`, or None where nothing is watched.
        stage: tells tables of this stage from the same documents in another.
    """

    def __init__(self, watch: Any, stage: str) -> None:
        self.watch, self.stage = watch, stage.encode()

    def _call(self, name: str, *arguments: Any) -> Any:
        if self.watch is None:
            return 0
        import ray

        return ray.get(getattr(self.watch, name).remote(*arguments))

    def start(self) -> None:
        """Say that the model is about to be loaded."""
        self._call("start")

    def run(
        self, table: pa.Table, work: Callable[[pa.Table], Result], give_up: Callable[[pa.Table], Result]
    ) -> list[Result]:
        """`work` on the table; piece by piece where it killed a worker before, and `give_up` on documents that do.

        Call `end` once the results are safe.

        Args:
            table: with the columns `document_id` and `text_hash`.
        """
        name = self._name(table)
        if not self._call("begin", name, num_tokens(table)):
            return [work(table)]
        results = []
        for row in range(len(table)):
            one = table.slice(row, 1)
            killed = self._call("alone", name, self._name(one))
            results.append(give_up(one) if killed >= MOST_DEATHS_ALONE else work(one))
        self._call("alone", name, None)
        return results

    def end(self, table: pa.Table) -> None:
        """Forget a table: its results are written."""
        self._call("end", self._name(table))

    def _name(self, table: pa.Table) -> bytes:
        """The same for the same documents, whichever worker asks."""
        digest = hashlib.blake2b(self.stage, digest_size=16)
        for column in ("document_id", "text_hash"):
            for value in table[column].to_pylist():
                raw = value.encode() if isinstance(value, str) else value
                digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.digest()
