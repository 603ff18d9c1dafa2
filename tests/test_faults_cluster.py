"""A raylet of three is killed while a run goes: the machine with the encoder, another one, or the driver's own.

A cluster in one process group (`ray.cluster_utils.Cluster`): three raylets, one GCS. What the lost machine held is
computed again elsewhere; a run whose own raylet dies ends, and the next one takes up where it stood.
"""

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from faults import Scene, Yard, bring_to_the_end, conclude, disturb, start
from nights import NUM_NIGHTS
from strikes import Moment, NothingToHarm, Strike, ancestors, draw_moment, encoders, own_raylets

from cluster.session import QUIET, quieten

pytestmark = pytest.mark.slow


class Raylets:
    """A head with the driver and two more raylets; `mend` brings them back to three."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.head = next(iter(own_raylets()))
        self.mend()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def mend(self) -> None:
        for node in list(self.cluster.worker_nodes):
            if not any(info.process.poll() is None for info in node.all_processes["raylet"]):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(num_cpus=2)

    def others(self) -> set[int]:
        return own_raylets() - {self.head}

    def stop(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    import ray
    import ray.data

    quieten()
    if ray.is_initialized():
        ray.shutdown()
    three = Raylets()
    yield three
    three.stop()


@pytest.fixture(scope="module")
def yard(tmp_path_factory, tiny_model_folder) -> Yard:
    """A yard without S3; its undisturbed tables are made in whatever Ray the first test has."""
    return Yard(tmp_path_factory.mktemp("yard"), tiny_model_folder)


def test_a_raylet_is_killed(yard, raylets):
    """Six runs, one after the other in one cluster, which gets a new machine for each that it lost."""
    for seed in range(6):
        draw = random.Random(f"raylet {seed}")
        scene = Scene(yard, draw.randrange(NUM_NIGHTS), on_s3=False, name=f"raylet-{seed}")
        moment = draw_moment(draw, scene.after, ("encoder", "fragments", "versions")[seed % 3])
        if moment.what == "encoder":
            moment = Moment("encoder", 1, draw.uniform(0, 3))
        beside_the_encoder = seed == 5

        def harm(scene: Scene = scene, beside: bool = beside_the_encoder) -> None:
            busy = set(encoders()) - scene.leftover
            holds = {raylet for raylet in raylets.others() if any(raylet in ancestors(pid) for pid in busy)}
            chosen = raylets.others() - holds if beside else holds
            if not chosen:
                raise NothingToHarm
            os.kill(min(chosen), signal.SIGKILL)

        disturb(scene, "raylet", seed, moment, harm, "compute.commit_every_s=0")
        raylets.mend()


@pytest.mark.parametrize("seed", range(2))
def test_the_raylet_of_the_driver_is_killed(yard, raylets, seed):
    """The driver is a process of its own, so that this one outlives it; GCS goes on, and two raylets."""
    draw = random.Random(f"head raylet {seed}")
    begun = time.monotonic()
    yard.address = raylets.cluster.address
    scene = Scene(yard, draw.randrange(NUM_NIGHTS), on_s3=False, name=f"head-{seed}")
    moment = draw_moment(draw, scene.after, ("fragments", "versions")[seed % 2])
    driver = start(scene.command("compute.commit_every_s=0"))
    with scene.readers():
        strike = Strike(scene, moment, lambda: os.kill(raylets.head, signal.SIGKILL))
        strike.start()
        driver.communicate(timeout=600)
        phase = strike.finish()
        raylets.stop()
        raylets.start()
        reruns = bring_to_the_end(scene)
    conclude(scene, "raylet-driver", seed, moment, phase, f"status {driver.returncode}", reruns, begun)
