"""An S3 server that tests may ill-treat, and a proxy in front of it that answers like a store in trouble.

SeaweedFS keeps every write that it acknowledged through `kill -9`; a stopped one (SIGSTOP) makes clients wait. The
proxy passes everything on, one request a connection, until it is told to refuse a share of them.
"""

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret123"}
BUCKET = "bucket"


def find_weed() -> str | None:
    """The program, from the environment's own folder or from the path."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def free_ports(count: int) -> list[int]:
    """Ports on which, and 10,000 above which, nothing listens: the server takes both."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Seaweed:
    """A server of its own folder and ports; `start` after `kill` brings it back with what it had."""

    def __init__(self, program: str, folder: Path, keys: dict[str, str] = KEYS) -> None:
        self.folder, self.keys = folder, keys
        ports = free_ports(5)
        self.port = ports[-1]
        names = ("master", "volume", "filer", "admin", "s3")
        self.command = [program, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self.command += [f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)]
        self.command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-webdav=false", "-admin.ui=false"]
        self.command += ["-master.telemetry=false", f"-s3.localSocket={folder}/s3.sock"]
        self.command += [f"-filer.localSocket={folder}/filer.sock"]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables under which everything of ours reaches the server, or a proxy in front of it."""
        return self.keys | {"AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_REGION": "us-east-1"}

    def client(self) -> Any:
        """s3fs straight to the server, without a cache of listings."""
        import s3fs

        key, secret = self.keys.values()
        return s3fs.S3FileSystem(
            key=key, secret=secret, endpoint_url=self.endpoint, use_listings_cache=False, skip_instance_cache=True
        )

    def start(self, timeout_s: float = 60) -> None:
        """Start and wait until it answers, with the bucket there."""
        with (self.folder / "log").open("ab") as log:
            env = os.environ | self.keys | {"GOMEMLIMIT": "400MiB"}
            self.process = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                client = self.client()
                if not client.exists(BUCKET):
                    client.mkdir(BUCKET)
                client.pipe_file(f"{BUCKET}/.alive", b"yes")
                return
            except Exception:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.3)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: what was acknowledged stays."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a store in trouble does."""

    status: int
    """500 or 503."""
    share: float
    """Of the requests, drawn one by one."""
    carried_out: bool = False
    """The request takes effect, and the answer is lost all the same."""
    only: tuple[bytes, ...] = (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")
    """Methods it concerns."""


class Proxy:
    """Listens on a port of its own, in a thread of its own."""

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.upstream_port = upstream_port
        self.trouble: Trouble | None = None
        self.refused = 0
        self.draw = random.Random(seed)
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self.port = 0

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()
            server.close()

        self.thread = threading.Thread(target=run, name="s3-proxy", daemon=True)
        self.thread.start()
        assert started.wait(60)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            trouble = self.trouble
            hit = trouble is not None and head.split(b" ", 1)[0] in trouble.only and self.draw.random() < trouble.share
            if hit and not trouble.carried_out:
                await _skip_body(head, reader)
                self._refuse(writer, trouble.status)
                return
            back, upstream = await asyncio.open_connection("127.0.0.1", self.upstream_port)
            upstream.write(_closing(head))
            forward = asyncio.ensure_future(_pump(reader, upstream))
            if hit:
                await self._swallow(back, writer)
                self._refuse(writer, trouble.status)
            else:
                await _pump(back, writer)
            forward.cancel()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # one side went away: so does the other, which is what a client of a dead server sees
        finally:
            for side in (writer, upstream):
                if side is not None:
                    side.close()

    @staticmethod
    async def _swallow(back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the server's answer to its end and keep it; `100 Continue` is no answer, the client waits for it."""
        while block := await back.read(1 << 16):
            if block.startswith(b"HTTP/1.1 100"):
                writer.write(block.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n")

    def _refuse(self, writer: asyncio.StreamWriter, status: int) -> None:
        self.refused += 1
        code = {500: "InternalError", 503: "SlowDown"}[status]
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>in trouble</Message></Error>'.encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)


def _closing(head: bytes) -> bytes:
    """The head of a request, asking the server to close the connection when it has answered."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n"


async def _skip_body(head: bytes, reader: asyncio.StreamReader) -> None:
    """Read the body of a request that is refused, unless its sender waits to be told to send it."""
    fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
    if b"expect" not in fields:
        await reader.readexactly(int(fields.get(b"content-length", 0)))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while block := await source.read(1 << 16):
        target.write(block)
        await target.drain()
