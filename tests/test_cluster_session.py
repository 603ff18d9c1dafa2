"""A session: quiet, reused where there is one, and honest about processors."""

import subprocess
import sys
from pathlib import Path

from cluster.session import SPARE_CPUS, local_cpus, physical_cores, session

ROOT = Path(__file__).resolve().parent.parent


def test_processors():
    assert 1 <= physical_cores() <= local_cpus()
    assert local_cpus(actors=50) >= 50 + SPARE_CPUS


def test_existing_session_is_used_and_left(ray_session):
    import ray

    before = ray.get_runtime_context().get_job_id()
    with session():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_local_session_is_quiet_and_ends():
    code = (
        "from cluster.session import session\n"
        "with session():\n"
        "    import ray\n"
        "    loud = ray.remote(lambda: print('worker speaks'))\n"
        "    ray.get(loud.remote())\n"
        "    assert ray.data.range(3).map_batches(lambda batch: batch).count() == 3\n"
        "assert not ray.is_initialized()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
