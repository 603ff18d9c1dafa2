"""A Ray session: the cluster that was named, or a local one that comes and goes with the job.

Ray says a lot on stderr. None of it is the user's business while things go well, so it is turned off before Ray is
imported; what workers print stays in the session's log folder.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.checkout import EVERYWHERE, LEFT_OUT

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
}
ADDRESS = "NIGHTLOOM_ADDRESS"
"""The variable that names the cluster where a command's settings name none: submitted jobs have it, and machines of a
cluster may."""
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's variable that tells a submitted job of its runtime environment; a second one would be refused."""
SPARE_CPUS = 2
"""Logical CPUs that Ray Data needs free beside embedding actors; with fewer it has hung."""
ATTEMPTS = 3


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs' worth of time that this process's cgroup may take; infinite without a limit.

    A container with a limit of 8 CPUs on a machine of 96 may run on all of them, and for a twelfth of the time.
    """
    try:
        if (root / "cpu.max").is_file():  # cgroup v2
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def own_cpus() -> set[int]:
    """The logical CPUs that this process may run on, whatever its share of their time."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def allowed_cpus() -> int:
    """Logical CPUs that this process may use, by affinity and by quota (rounded up)."""
    return max(1, math.ceil(min(len(own_cpus()), cpu_quota())))


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once where Linux says which they are."""
    cores = set()
    for cpu in own_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return min(len(cores), allowed_cpus())


def local_cpus(actors: int = 1) -> int:
    """Logical CPUs to declare for a local session with this many embedding actors."""
    return max(4, allowed_cpus(), actors + SPARE_CPUS)


def cluster_address(address: str | None) -> str | None:
    """The cluster that the settings name, or else the environment; None for a local session."""
    return address or os.environ.get(ADDRESS) or None


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray within the block, quietly; nothing happens where a session exists already.

    Args:
        address: a running cluster ("auto" for this machine's own); None: what $NIGHTLOOM_ADDRESS says, or a local one
            that ends after the block.
        num_cpus: logical CPUs of a local one.

    Raises:
        ConnectionError: there is no cluster at `address`.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    import ray
    import ray.data  # sets up its own logging when imported, so before `quieten`

    quieten()
    if ray.is_initialized():
        yield
        return
    address = cluster_address(address)
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"address": "local", "num_cpus": num_cpus or local_cpus(), "include_dashboard": False}
    else:
        options["address"] = address
        if IN_A_JOB not in os.environ and (ROOT / "pyproject.toml").exists():
            options["runtime_env"] = {"working_dir": str(ROOT), "excludes": [*LEFT_OUT, *EVERYWHERE, "models"]}
    start(options)
    try:
        yield
    finally:
        ray.shutdown()


def start(options: dict[str, object]) -> None:
    """`ray.init`, again where it took too long: a busy machine may exceed the 30 s that Ray gives its raylet."""
    import ray

    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(**options)  # type: ignore[arg-type]
        except Exception as error:  # Ray raises a plain Exception here
            ray.shutdown()
            if attempt == ATTEMPTS or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start in time (this machine is busy); trying again")
        else:
            return


def quieten() -> None:
    """Keep what Ray and Ray Data log below an error out of the terminal, in this process."""
    for name in ("ray", "ray.data", "ray.tune", "ray.rllib", "ray.train"):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) in (
                sys.stderr,
                sys.stdout,
            ):
                handler.setLevel(logging.ERROR)
