"""Ray clusters of several raylets on this machine, with a job server: of a fixed size, or sized by an autoscaler.

In processes of their own, so that the Ray that other tests share goes on, and so that ending them ends their raylets
and nobody else's. `python tests/clusters.py` holds a fixed one: it takes orders as JSON lines, answers each with one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_S = 300
ATTEMPTS = 5
"""Ray gives a raylet 30 s to start; a busy machine takes longer."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def clean_environment(folder: Path, **environment: str) -> dict[str, str]:
    """Of a cluster whose files lie in `folder`; the programs of this Python come first."""
    plain = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    own = {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_AUTH_MODE"] = "disabled"  # else it depends on whether this user has ever started Ray
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return plain | own | {"PATH": path} | environment


class Machines:
    """A head with a job server, and raylets that come and go.

    Args:
        head: arguments of `ray.cluster_utils.Cluster` for the head node.
        workers: the same for each other raylet.
    """

    def __init__(self, head: dict[str, Any], *workers: dict[str, Any], **environment: str) -> None:
        # Sockets lie below it, and the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="nl", dir="/tmp"))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,  # not the checkout: what jobs import, they were sent
            env=clean_environment(self.folder, **environment),
            start_new_session=True,
        )
        try:
            answer = self.order(order="start", head=head)
            self.url, self.address = answer["url"], answer["address"]
            self.nodes = [self.add(**worker) for worker in workers]
        except AssertionError:
            self.stop()
            raise

    def order(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the process that holds the cluster has ended"
        return json.loads(answer)

    def add(self, **worker: Any) -> str:
        """Another raylet; its node's id."""
        return self.order(order="add", worker=worker)["node"]

    def kill(self, node: str) -> None:
        """A machine goes away without a word: SIGKILL to its raylet, whose workers end with it."""
        self.order(order="kill", node=node)

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.order(order="stop")
        end_all(self.folder, self.process)


HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
HEAD_TYPE = "ray.head.default"
"""What Ray's provider of pretended machines calls the head, and its kind."""


class Elastic:
    """A head without CPUs, and Ray's own autoscaler, which starts and ends raylets as jobs ask for them.

    As `ray.cluster_utils.AutoscalingCluster`, but for its start and end, which call `ray stop --force` on everybody.

    Args:
        worker: resources of the machines that may come.
        most: how many of them.
        more: variables of every machine.
    """

    def __init__(self, worker: dict[str, int], most: int, *, idle_s: float = 6, **more: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nl", dir="/tmp"))
        from ray._private.services import get_node_ip_address

        port = free_port()
        nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config = {
            "cluster_name": "elastic",
            "max_workers": most,
            "idle_timeout_minutes": idle_s / 60,
            "upscaling_speed": 10.0,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
                "gcs_address": f"{get_node_ip_address()}:{port}",
            },
            "auth": {},
            "docker": {},
            "head_node_type": HEAD_TYPE,
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "available_node_types": {
                HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
            **{f"{name}_commands": [] for name in nothing},
        }
        (self.folder / "config.json").write_text(json.dumps(config))
        dashboard = free_port()
        options = {
            "--port": port,
            "--dashboard-port": dashboard,
            "--dashboard-agent-listen-port": free_port(),
            "--ray-client-server-port": free_port(),
            "--num-cpus": 0,
            "--object-store-memory": 300_000_000,
            "--temp-dir": self.folder,
            "--autoscaling-config": self.folder / "config.json",
        }
        environment = more | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        with (self.folder / "start.log").open("w") as log:
            self.process = subprocess.Popen(
                ["ray", "start", "--head", "--block", *(f"{name}={value}" for name, value in options.items())],
                cwd=self.folder,
                env=clean_environment(self.folder, **environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{dashboard}"
        try:
            self._wait()
        except AssertionError:
            self.stop()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        said: re.Match[str] | None = None
        while said is None or not self._answers():
            text = (self.folder / "start.log").read_text()
            said = re.search(r"--address='([^']+)'", text)
            assert self.process.poll() is None, text
            assert time.monotonic() < until, "the head does not answer"
            time.sleep(0.5)
        self.address = said.group(1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/version", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def num_machines(self) -> int:
        """Raylets that are alive, without the head."""
        import ray

        nodes = ray._raylet.GcsClient(address=self.address).get_all_node_info(timeout=30).values()
        return sum(node.state == 0 for node in nodes) - 1

    def stop(self) -> None:
        self.process.terminate()
        end_all(self.folder, self.process)


def end_all(folder: Path, process: subprocess.Popen[Any]) -> None:
    """Wait for a cluster's own process, then end every other that names its folder, and nobody else's."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def own(*, dashboard: bool = False) -> dict[str, Any]:
    """Arguments of a node: free ports, others for each attempt, because what is left of a failed one keeps its own.

    And a folder for what jobs were sent: raylets that share one unpack it again for each of them, under those that run.
    """
    port = free_port()
    given: dict[str, Any] = {"dashboard_agent_listen_port": port, "runtime_env_dir_name": f"runtime_resources_{port}"}
    return given | ({"include_dashboard": True, "dashboard_port": free_port()} if dashboard else {})


def again(start: Callable[[], Any]) -> Any:
    """What it gives, tried again where a raylet did not come up in time."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return start()
        except Exception as error:  # Ray raises a plain Exception here
            if attempt == ATTEMPTS or "timed out during startup" not in str(error):
                raise
    raise AssertionError


def serve() -> None:
    """Carry out orders until there are no more, then end every process of the cluster."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    from ray.cluster_utils import Cluster

    cluster = None
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["order"] == "start":
            cluster = again(lambda given=order["head"]: Cluster(True, head_node_args=own(dashboard=True) | given))
            info = cluster.head_node.address_info
            # Where drivers that send something themselves expect it, whatever their machine's raylet has been told.
            Path(cluster.head_node.get_session_dir_path(), "runtime_resources").mkdir(exist_ok=True)
            answer = {"url": f"http://{info['webui_url']}", "address": cluster.address}
        elif order["order"] == "add":
            node = again(lambda given=order["worker"], held=cluster: held.add_node(**own(), **given))
            nodes[node.node_id] = node
            answer = {"node": node.node_id}
        elif order["order"] == "kill":
            for info in nodes[order["node"]].all_processes["raylet"]:
                info.process.kill()
        elif order["order"] == "stop":
            break
        print(json.dumps(answer), file=answers, flush=True)
    if cluster is not None:
        cluster.shutdown()
    print("{}", file=answers, flush=True)


if __name__ == "__main__":
    serve()
