"""How embedding is spread over the machines of a session: device, precision, how many actors, how they may grow.

On this machine alone, by its cores; on a cluster, by what `cluster.resources` finds there and what its autoscaler may
bring. Little work is not spread at all.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.metrics import is_collected
from cluster.resources import CPUS_PER_SLOT, bring_machine, find_machines, plan_pool, read_limits, threads_here
from cluster.session import SPARE_CPUS, cluster_address, local_cpus, physical_cores, session
from jobs.configuration import ComputeSettings
from model.errors import InputError
from pipeline.single import NO_GPU, ProcessDied, SingleProcess, best_dtype
from pipeline.workers import Workers

BLOCK_CHARS = {"cpu": 400_000, "cuda": 8_000_000}
"""Characters in one unit of work: some seconds of an encoder's time, and enough documents to fill its batches."""


class NoMachineError(RuntimeError):
    """There is no capacity at this hour: nothing is wrong with what was asked, and it may be asked again."""


class Place:
    """Where the work is done, from the first `start` on until the block ends: by workers of a Ray session, or, where
    there is little of it, by one process. A run that finds nothing to do starts neither.
    """

    def __init__(self, compute: ComputeSettings) -> None:
        self.compute = compute
        self.resources = ExitStack()
        self.single: SingleProcess | None = None
        self.on_ray = False

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    def start(self, chars: int) -> None:
        """Begin with what suits so many bytes of text; with Ray after all, if it had seemed to be less."""
        if self.on_ray:
            return
        # What is counted is counted by Ray.
        if not is_little(self.compute, chars) or is_collected(self.compute.address):
            self.start_ray()
        elif self.single is None:
            self.single = self.resources.enter_context(SingleProcess())
            self.single.start()

    def start_ray(self) -> None:
        if self.single is not None:
            self.single.close()
            self.single = None
        if not self.on_ray:
            cpus = local_cpus(self.compute.actors[1] if self.compute.actors else 1)
            self.resources.enter_context(session(self.compute.address, num_cpus=cpus))
            self.on_ray = True

    def device_and_dtype(self) -> tuple[str, str]:
        """What the encoder runs on, and the precision that is fastest there."""
        if self.single is not None:
            try:
                device = self.single.device(self.compute.device)
                return device.name, device.dtype
            except ProcessDied:
                self.retreat()
        name = choose_device(self.compute.device, self.compute.address)
        return name, dtype_of_workers(self.compute.address, name)

    def workers(self) -> Workers:
        if self.single is not None:
            device, _ = self.device_and_dtype()
            if self.single is not None:  # it lives
                return plan_single(self.compute, device)
        return plan_workers(self.compute, choose_device(self.compute.device, self.compute.address))

    def retreat(self) -> Workers:
        """The single process is dead: Ray's workers, which survive what killed it."""
        self.start_ray()
        return self.workers()

    def each(self, function: Callable[..., str], calls: list[tuple[Any, ...]]) -> list[str]:
        """What a function gives for each list of arguments: on workers where there are any, else here."""
        if not self.on_ray:
            return [function(*call) for call in calls]
        import ray

        task = ray.remote(function)
        return ray.get([task.remote(*call) for call in calls])


def is_little(compute: ComputeSettings, chars: int) -> bool:
    """Whether one process beside this one does it all sooner than Ray: it has not to wait for a session, and where a
    session would have one actor, that would not be faster. What is one unit of work has one actor anywhere.
    """
    ray = sys.modules.get("ray")
    if cluster_address(compute.address) is not None or (ray is not None and ray.is_initialized()):
        return False
    actors = compute.actors[0] if compute.actors else physical_cores() // CPUS_PER_SLOT
    return chars <= (compute.single_chars if actors <= 1 else min(compute.single_chars, BLOCK_CHARS["cpu"]))


def plan_single(compute: ComputeSettings, device: str) -> Workers:
    """The same for one process that has this machine to itself."""
    block_chars = compute.block_chars or BLOCK_CHARS[device]
    return Workers(1, device, physical_cores(), compute.tokens_per_batch, block_chars)


def choose_device(asked: str, address: str | None = None) -> str:
    """cpu or cuda for the actors of this session; "auto" takes GPUs where the session has any, or may get some.

    Raises:
        InputError: GPUs are asked for and this machine has none.
        NoMachineError: nor has the cluster, and none came.
    """
    gpus = any(machine.gpus for machine in find_machines())
    if asked == "cuda" and not gpus:
        if cluster_address(address) is None:
            raise InputError(NO_GPU)
        await_machine("cuda")
    return asked if asked != "auto" else "cuda" if gpus else "cpu"


def dtype_of_workers(address: str | None, device: str) -> str:
    """`best_dtype` where the work is done: here, or on a machine of the cluster."""
    if cluster_address(address) is None:
        return best_dtype(device)
    import ray

    await_machine(device)
    task = ray.remote(best_dtype).options(num_gpus=1 if device == "cuda" else 0)
    return ray.get(task.remote(device))


def await_machine(device: str) -> None:
    """Wait for a machine that can hold an actor.

    Raises:
        NoMachineError: none came.
    """
    gpu = device == "cuda"
    if not bring_machine(gpu=gpu):
        kind = "GPU" if gpu else "CPU"
        raise NoMachineError(f"the cluster has no {kind} for an actor, and no machine with one came; try again later")


def plan_workers(compute: ComputeSettings, device: str) -> Workers:
    """How many actors there are, and how many threads each has.

    Raises:
        InputError: more actors than the session has processors for, or a cluster may ever have.
        NoMachineError: a cluster has no machine for an actor, and none came.
    """
    import ray

    resources = ray.cluster_resources()
    workers = Workers(
        actors=1,
        device=device,
        threads=1,
        tokens_per_batch=compute.tokens_per_batch,
        block_chars=compute.block_chars or BLOCK_CHARS[device],
    )
    if cluster_address(compute.address) is not None:
        await_machine(device)
        try:
            pool = plan_pool(
                find_machines(), gpu=device == "cuda", asked=compute.actors, limited=read_limits() is not None
            )
        except ValueError as error:
            raise InputError(f"compute.actors: {error}") from None
        return replace(
            workers,
            actors=pool.most,
            least=pool.least,
            first=pool.first,
            cpus=pool.cpus,
            threads=partial(threads_here, pool.slot),
            share=0.5 if pool.slot == 1 else 1.0,  # machines of one CPU have readers beside their actor too
        )
    if device == "cuda":
        most = int(resources["GPU"])
        usual, unit = most, "GPUs"
    else:
        most = max(1, int(resources.get("CPU", 1)) - SPARE_CPUS)
        usual = min(most, max(1, physical_cores() // CPUS_PER_SLOT))
        unit = f"CPUs, {SPARE_CPUS} of them kept free"
    least, actors = compute.actors or (usual, usual)
    if actors > most:
        raise InputError(f"compute.actors is {actors}, this session has room for {most} ({unit})")
    return replace(
        workers,
        actors=actors,
        least=least,
        first=actors,
        threads=max(1, physical_cores() // actors),
        share=min(1.0, resources.get("CPU", 1) / (actors + SPARE_CPUS)),
    )
