"""A session: quiet, reused where there is one, and honest about processors."""

import math
import subprocess
import sys
from pathlib import Path

from cluster.session import SPARE_CPUS, allowed_cpus, cpu_quota, local_cpus, physical_cores, session

ROOT = Path(__file__).resolve().parent.parent


def test_processors():
    assert 1 <= physical_cores() <= local_cpus()
    assert local_cpus(actors=50) >= 50 + SPARE_CPUS


def test_a_container_has_the_cpus_of_its_limit(tmp_path, monkeypatch):
    """A machine of 96 CPUs, of which a pod may have eight, or two and a half: three threads keep those busy."""
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", "-1"), ("period", "100000")):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(value)
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("800000")
    assert cpu_quota(tmp_path) == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr("cluster.session.cpu_quota", lambda: 8.0)
    assert (allowed_cpus(), local_cpus()) == (8, 8)
    assert physical_cores() <= 8
    monkeypatch.setattr("cluster.session.cpu_quota", lambda: 2.5)
    assert (allowed_cpus(), physical_cores()) == (3, 3)
    monkeypatch.setattr("cluster.session.cpu_quota", lambda: math.inf)
    assert allowed_cpus() == 96


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
