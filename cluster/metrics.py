"""What nightloom counts for a metrics system, and how it reaches one: through Ray, whose agent on every node has a page
that Prometheus reads.

Counters of the driver are of what was committed, those of actors of what was encoded, committed later or not: they
differ by what is under way, and by what was lost. `cluster/grafana.json` draws them.
"""

import os
from dataclasses import dataclass
from typing import Any

from cluster.session import cluster_address

PREFIX = "nightloom"
SWITCH = "NIGHTLOOM_METRICS"
"""on or off, whatever the address says."""
BLOCK_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric by the name that code uses; on the page it is `ray_nightloom_NAME`, for a counter with `_total`."""

    kind: str
    """counter, gauge or histogram."""
    where: str
    """driver or actor: who counts."""
    meaning: str


METRICS = {
    "documents": Metric("counter", "driver", "Documents whose vectors were committed"),
    "vectors": Metric("counter", "driver", "Vectors that were committed"),
    "tokens": Metric("counter", "driver", "Tokens of committed documents that the encoder saw"),
    "padding_tokens": Metric("counter", "driver", "Positions of them that were padding"),
    "truncated_tokens": Metric("counter", "driver", "Tokens of committed documents that were cut off"),
    "dead_documents": Metric("counter", "driver", "Documents that could not be embedded"),
    "commits": Metric("counter", "driver", "Commits that added vectors"),
    "wasted_tokens": Metric("counter", "driver", "Tokens that were encoded for nothing, known at the end of a run"),
    "waiting_documents": Metric("gauge", "driver", "Planned documents that have not arrived"),
    "waiting_fragments": Metric("gauge", "driver", "Written fragments that wait for their commit"),
    "actors": Metric("gauge", "driver", "Processes that hold the encoder"),
    "encoded_tokens": Metric("counter", "actor", "Tokens that the encoder saw, committed later or not"),
    "encoder_seconds": Metric("counter", "actor", "Seconds spent in the encoder; its rate is the share of one device"),
    "block_seconds": Metric("histogram", "actor", "Seconds to embed and write a block of documents"),
}
"""Everything that is counted. Each has the label `table`: the last part of the table's name."""


def exported() -> dict[str, str]:
    """{name on the page: kind} of all metrics."""
    return {f"ray_{PREFIX}_{name}{'_total' * (m.kind == 'counter')}": m.kind for name, m in METRICS.items()}


def is_collected(address: str | None) -> bool:
    """Whether a run at this address counts: on a cluster, unless the environment says otherwise."""
    said = os.environ.get(SWITCH, "").lower()
    return said == "on" or (cluster_address(address) is not None and said != "off")


class RayMeter:
    """Counts for one table in one process that belongs to a Ray session. Made anew in each process.

    Args:
        table: its name; only the last part is kept, because a metrics system is no place for paths.
    """

    def __init__(self, table: str) -> None:
        self.tags = {"table": table.rstrip("/").rpartition("/")[2]}
        self.made: dict[str, Any] = {}

    def add(self, **counts: float) -> None:
        for name, value in counts.items():
            if value > 0:  # Ray refuses 0
                self._metric(name).inc(value)

    def set(self, **gauges: float) -> None:
        for name, value in gauges.items():
            self._metric(name).set(value)

    def observe(self, **values: float) -> None:
        for name, value in values.items():
            self._metric(name).observe(value)

    def _metric(self, name: str) -> Any:
        """The metric of this name; a KeyError if METRICS does not have it."""
        if name not in self.made:
            from ray.util import metrics

            metric = METRICS[name]
            about = {"description": metric.meaning, "tag_keys": ("table",)}
            if metric.kind == "histogram":
                made = metrics.Histogram(f"{PREFIX}_{name}", boundaries=BLOCK_SECONDS, **about)
            else:
                made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(f"{PREFIX}_{name}", **about)
            self.made[name] = made.set_default_tags(self.tags)
        return self.made[name]
