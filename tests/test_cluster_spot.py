"""A cloud's notice becomes a drain: against a real HTTP server that speaks as the metadata servers do."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from clusters import Machines

from cluster.spot import GCP_NOTICE_S, AmazonMetadata, GoogleMetadata, wait_for_notice
from jobs.commands import ROOT

END = "2031-09-18T08:22:00Z"


class Cloud(BaseHTTPRequestHandler):
    """Both clouds' metadata; `notice` and `broken` of the server say how it is."""

    def do_PUT(self) -> None:
        if self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            self.server.tokens += 1
            self.answer(200, f"token-{self.server.tokens}")
        else:
            self.answer(400)

    def do_GET(self) -> None:
        self.server.looks += 1
        if self.server.broken:
            return self.answer(503)
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != f"token-{self.server.tokens}":
                return self.answer(401)
            action = json.dumps({"action": "terminate", "time": self.server.end})
            return self.answer(200, action) if self.server.notice else self.answer(404)
        if self.path == "/computeMetadata/v1/instance/preempted":
            if self.headers["Metadata-Flavor"] != "Google":
                return self.answer(403)
            return self.answer(200, "TRUE" if self.server.notice else "FALSE")
        return self.answer(404)

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cloud() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    server.notice = server.broken = False
    server.tokens = server.looks = 0
    server.end = END
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_amazon_says_when(cloud):
    metadata = AmazonMetadata(cloud.url)
    assert metadata.look() is None
    cloud.notice = True
    notice = metadata.look()
    assert datetime.fromtimestamp(notice.end, UTC) == datetime(2031, 9, 18, 8, 22, tzinfo=UTC)
    assert notice.reason == "spot terminate"
    assert cloud.tokens == 1


def test_a_token_that_is_refused_is_replaced(cloud):
    metadata = AmazonMetadata(cloud.url)
    metadata.look()
    cloud.tokens = 7  # the server has forgotten the first
    cloud.notice = True
    assert wait_for_notice(metadata, 0.01).reason == "spot terminate"
    assert cloud.tokens == 8


def test_google_says_that_it_is_soon(cloud):
    assert GoogleMetadata(cloud.url).look() is None
    cloud.notice = True
    assert 0 < GoogleMetadata(cloud.url).look().end - time.time() <= GCP_NOTICE_S


@pytest.mark.parametrize("kind", [AmazonMetadata, GoogleMetadata])
def test_a_server_in_trouble_says_nothing_about_the_machine(cloud, kind, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which is not asked
    cloud.broken = True

    def mend() -> None:
        while cloud.looks < 3:
            time.sleep(0.01)
        cloud.broken, cloud.notice = False, True

    threading.Thread(target=mend, daemon=True).start()
    assert wait_for_notice(kind(cloud.url), 0.01)
    assert cloud.looks > 3


@pytest.mark.slow
def test_the_node_is_drained_and_gets_nothing_new(cloud):
    """The sidecar as it runs on a machine, beside a real cluster of two."""
    two = Machines({"num_cpus": 1}, {"num_cpus": 1})
    cloud.notice, cloud.end = True, datetime.fromtimestamp(time.time() + 600, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        command = ("aws", "--address", two.address, "--node", two.nodes[0], "--endpoint", cloud.url, "--every", "0.1")
        done = subprocess.run(
            [sys.executable, "-m", "cluster.spot", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert f"draining node {two.nodes[0]}" in done.stderr
        # An idle node ends as soon as it is drained; one that works stays until its deadline.
        look = (
            f"import ray; ray.init('{two.address}', log_to_driver=False); "
            "gone = [node['NodeID'] for node in ray.nodes() if not node['Alive']]; "
            "print(gone, list(ray._private.state.state.get_draining_nodes()))"
        )
        seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120)
        assert two.nodes[0] in seen.stdout, seen
    finally:
        two.stop()
