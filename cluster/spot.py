"""Turns a cloud's notice that a spot machine is about to be taken away into a drain of its Ray node.

`python -m cluster.spot aws` runs beside the raylet of every spot machine of a `ray up` cluster and ends once the node
is drained. Ray then sends it nothing new; embedding finishes or hands back what is in flight, training writes a
checkpoint. On Kubernetes the pod's SIGTERM does the same, without this.
"""

import argparse
import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
AWS_TOKEN_S = 21_600
GCP_NOTICE_S = 30
"""What Google gives a spot machine between its notice and its end."""
MARGIN_S = 5
"""Kept free before the end, so that Ray's own shutdown comes in time."""
TIMEOUT_S = 2.0
DRAIN_ATTEMPTS = 5

log = logging.getLogger("nightloom.spot")


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine goes away."""

    end: float
    """Unix time."""
    reason: str


def ask(url: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
    """The answer of a metadata server, None where it says 404. Never through a proxy, which would answer for itself.

    Raises:
        OSError: it does not answer, or with another error.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT_S) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


class AmazonMetadata:
    """IMDSv2: a session token, then `spot/instance-action`, which is not found until there is one."""

    def __init__(self, endpoint: str = AWS) -> None:
        self.endpoint, self.token, self.token_until = endpoint, "", 0.0

    def look(self) -> Notice | None:
        if time.monotonic() >= self.token_until:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_S)}
            self.token = ask(f"{self.endpoint}/latest/api/token", headers, method="PUT") or ""
            self.token_until = time.monotonic() + AWS_TOKEN_S / 2
        headers = {"X-aws-ec2-metadata-token": self.token}
        try:
            answer = ask(f"{self.endpoint}/latest/meta-data/spot/instance-action", headers)
        except urllib.error.HTTPError:
            self.token_until = 0.0  # the token is refused: the next look fetches another
            raise
        if answer is None:
            return None
        action = json.loads(answer)
        end = datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        return Notice(end.timestamp(), f"spot {action['action']}")


class GoogleMetadata:
    """`instance/preempted`, which turns from FALSE to TRUE 30 s before the end."""

    def __init__(self, endpoint: str = GCP) -> None:
        self.endpoint = endpoint

    def look(self) -> Notice | None:
        answer = ask(f"{self.endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        if (answer or "").strip().upper() != "TRUE":
            return None
        return Notice(time.time() + GCP_NOTICE_S, "spot preemption")


def wait_for_notice(metadata: AmazonMetadata | GoogleMetadata, every_s: float) -> Notice:
    """Look until there is a notice. A server that does not answer is asked again: it says nothing about the machine."""
    silent = False
    while True:
        try:
            if notice := metadata.look():
                return notice
            silent = False
        except (OSError, ValueError, KeyError) as error:
            if not silent:
                log.warning("the metadata server gives no answer, asking on: %s", error)
            silent = True
        time.sleep(every_s)


def own_node(address: str) -> str:
    """The id of this machine's node in the cluster at `address`."""
    import ray

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return ray.get_runtime_context().get_node_id()
    finally:
        ray.shutdown()


def drain(address: str, node: str, notice: Notice) -> None:
    """Tell the cluster that a node ends: as `ray drain-node` does, again where the head is busy.

    Args:
        address: of the cluster's GCS, as in 10.0.0.1:6379.

    Raises:
        RuntimeError: the cluster refuses.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    end_ms = int(max(notice.end - MARGIN_S, time.time() + 1) * 1000)
    for attempt in range(1, DRAIN_ATTEMPTS + 1):
        try:
            accepted, why = ray._raylet.GcsClient(address=address).drain_node(node, reason, notice.reason, end_ms)
        except Exception as error:  # the client's exceptions have no common name
            accepted, why = False, str(error)
        if accepted:
            return
        log.warning("attempt %d to drain %s failed: %s", attempt, node, why)
        time.sleep(1)
    raise RuntimeError(f"the cluster at {address} does not drain {node}: {why}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.spot", description=__doc__.splitlines()[0])
    parser.add_argument("cloud", choices=("aws", "gcp"))
    parser.add_argument(
        "--address", help="of the cluster, as HOST:6379 (default: the one that this machine belongs to)"
    )
    parser.add_argument("--node", help="id of the node to drain (default: this machine's)")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between looks (default: 2)")
    parser.add_argument("--endpoint", metavar="URL", help="metadata server (default: the cloud's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait for the notice, drain, end with status 0."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    from ray._private.services import canonicalize_bootstrap_address_or_die

    address = canonicalize_bootstrap_address_or_die(options.address)
    node = options.node or own_node(address)
    metadata = (
        AmazonMetadata(options.endpoint or AWS) if options.cloud == "aws" else GoogleMetadata(options.endpoint or GCP)
    )
    log.info("watching %s for node %s", options.cloud, node)
    notice = wait_for_notice(metadata, options.every)
    log.info("%s in %.0f s: draining node %s", notice.reason, notice.end - time.time(), node)
    drain(address, node, notice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
