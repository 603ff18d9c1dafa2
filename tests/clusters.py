"""A Ray cluster of several raylets on this machine, in a process of its own, with a job server.

In a process of its own, so that the Ray that other tests share goes on, and so that ending it ends its raylets and
nobody else's. `python tests/clusters.py` is that process: it takes orders as JSON lines and answers each with one.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_S = 300


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Machines:
    """A head with a job server, and raylets that come and go.

    Args:
        head: arguments of `ray.cluster_utils.Cluster` for the head node.
        workers: the same for each other raylet.
    """

    def __init__(self, head: dict[str, Any], *workers: dict[str, Any], **environment: str) -> None:
        # Sockets lie below it, and the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="nl", dir="/tmp"))
        plain = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        own = {"RAY_TMPDIR": str(self.folder), "TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,  # not the checkout: what jobs import, they were sent
            env=plain | own | {"PATH": path} | environment,
            start_new_session=True,
        )
        answer = self.order(order="start", head=head)
        self.url, self.address = answer["url"], answer["address"]
        self.nodes = [self.add(**worker) for worker in workers]

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
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


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
            head = {"include_dashboard": True, "dashboard_port": free_port()} | order["head"]
            cluster = Cluster(initialize_head=True, head_node_args={"dashboard_agent_listen_port": free_port(), **head})
            info = cluster.head_node.address_info
            answer = {"url": f"http://{info['webui_url']}", "address": cluster.address}
        elif order["order"] == "add":
            node = cluster.add_node(dashboard_agent_listen_port=free_port(), **order["worker"])
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
