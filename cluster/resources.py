"""What a cluster has, and may get from its autoscaler: how many embedding actors fit, and what each of them asks for.

Found, not typed, but for how far a cluster may grow: that is known only where its autoscaler says so to Ray, which
Ray's own does not. On CPUs an actor gets a slot of at most `CPUS_PER_SLOT` logical CPUs on the machines that hold most
of them, one of which it leaves to the tasks that read and tokenize; on GPUs it gets one. A pool begins with what fits
now and grows to what the cluster may become, which is what makes an autoscaler bring machines.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.session import SPARE_CPUS, allowed_cpus, physical_cores

CPUS_PER_SLOT = 8
"""More threads than that do not make one batch of an encoder faster."""
NO_LIMIT = 1_000
"""Machines of a kind, where the autoscaler has no limit for it."""
PATIENCE_S = 900.0
"""What the first machine of an empty cluster may take to come."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine."""

    cpus: int
    gpus: int
    now: int
    """How many of them there are."""
    most: int
    """How many there may be."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and what each asks for."""

    least: int
    first: int
    most: int
    cpus: int
    gpus: int
    slot: int
    """Logical CPUs that an actor and the tasks that feed it have to themselves."""


def find_machines() -> list[Machine]:
    """The kinds of machines of the cluster that this process is connected to, with what its autoscaler may add."""
    import ray

    now = Counter(shape(node["Resources"]) for node in ray.nodes() if node["Alive"])
    most = Counter(now)
    config = read_limits()
    for group in config.node_group_configs if config else ():
        kind = shape(dict(group.resources))
        most[kind] = max(now[kind], group.max_count if group.max_count >= 0 else NO_LIMIT)
    return [Machine(*kind, now[kind], most[kind]) for kind in most if most[kind]]


def read_limits() -> Any:
    """What the autoscaler says of the machines it may bring, as Ray's ClusterConfig; None if it says nothing."""
    import ray

    return ray._private.state.state.get_cluster_config()


def bring_machine(*, gpu: bool, patience_s: float = PATIENCE_S) -> bool:
    """Have the autoscaler bring a first machine that can hold an actor, where there is none; whether there is one."""
    from ray.autoscaler.sdk import request_resources

    def is_there() -> bool:
        return any(machine.now and (machine.gpus if gpu else machine.cpus) for machine in find_machines())

    if is_there():
        return True
    log.warning("the cluster has no %s yet; waiting for its autoscaler to bring a machine", "GPU" if gpu else "CPU")
    request_resources(bundles=[{"GPU" if gpu else "CPU": 1}])
    until = time.monotonic() + patience_s
    try:
        while not is_there():
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
    finally:
        request_resources(bundles=[])  # from now on the actors ask for themselves
    return True


def shape(resources: dict[str, Any]) -> tuple[int, int]:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def plan_pool(
    machines: Iterable[Machine], *, gpu: bool, asked: tuple[int, int] | None = None, limited: bool = True
) -> Pool:
    """The pool for these machines.

    Args:
        asked: the smallest and largest size; by default from one actor to all that may fit.
        limited: whether there will never be more machines than their `most`. If not, more actors than fit may be asked
            for: an autoscaler that says nothing of its limits may bring machines for them.

    Raises:
        ValueError: so many will never fit: one line that says how many do.
    """
    machines = list(machines)
    if gpu:
        slot, fitting = 1, [(machine.gpus, machine) for machine in machines]
    else:
        # Of the kind with the most CPUs in all: a small head beside large workers must not make actors small.
        largest = max(machines, key=lambda machine: machine.cpus * machine.most)
        slot = max(1, min(CPUS_PER_SLOT, largest.cpus))
        fitting = [(machine.cpus // slot, machine) for machine in machines]
    most = sum(number * machine.most for number, machine in fitting)
    now = sum(number * machine.now for number, machine in fitting)
    least, top = asked or (1, most)
    if limited and top > most:
        unit = "GPUs" if gpu else f"slots of {slot} CPUs"
        raise ValueError(f"{top} actors will never fit on this cluster, it has {now} {unit} and may get {most}")
    first = min(max(now, least), top)
    # Ray Data hangs with fewer than two logical CPUs beside its actors, on however many machines they are.
    spare = 1 if max(most, top) > 1 else SPARE_CPUS
    return Pool(least, first, top, cpus=max(1, slot - spare), gpus=int(gpu), slot=slot)


def threads_here(slot: int) -> int:
    """Threads for one actor on the machine of this process: its cores, shared among the actors that fit on it."""
    import ray

    me = ray.get_runtime_context().get_node_id()
    declared = next((shape(node["Resources"])[0] for node in ray.nodes() if node["NodeID"] == me), 0)
    # A container has as many CPUs as it was given, and sees all those of its machine.
    cores = min(physical_cores(), declared or allowed_cpus())
    return max(1, cores // max(1, declared // slot))
