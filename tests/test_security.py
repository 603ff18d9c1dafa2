"""What must not happen: a model folder that runs something, a port that others reach, a join without the token."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.session import session

ROOT = Path(__file__).resolve().parent.parent
PLANTED = (
    *("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "tf_model.h5", "flax_model.msgpack", "model.ckpt", "modeling_custom.py", "1_Pooling/model.bin"),
)
"""Names under which model folders have brought programs."""


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def plant(folder: Path, trace: Path) -> None:
    for name in PLANTED:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".py"):
            path.write_text(f"import os\nos.mkdir({str(trace)!r})\n")
        else:
            path.write_bytes(pickle.dumps(Payload(trace)))


WATCH = """
    import json, os, sys
    sys.path.insert(0, {root!r})
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "import") else None)
    {action}
    names = {names!r}
    print(json.dumps([path for path in opened if any(path.endswith("/" + name) for name in names)]))
"""
ACTIONS = {
    "an embedder": 'from model import Embedder; Embedder({folder!r}, device="cpu", dtype="float32").encode(["x"])',
    "a decoder's or encoder's folder": "from model.folder import read_folder, weights_hash; weights_hash({folder!r})",
    "a plan": 'from jobs.cli import main; assert main(["plan", {source!r}, {table!r}, "--model", {folder!r}]) == 0',
}


@pytest.mark.parametrize("what", ACTIONS)
def test_what_is_pickled_in_a_model_folder_is_never_opened(tmp_path, tiny_model_folder, what):
    """Python's audit events tell of every file that it opens; whatever opened one otherwise would leave the trace."""
    folder, trace, source = tmp_path / "model", tmp_path / "trace", tmp_path / "source"
    shutil.copytree(tiny_model_folder, folder)
    plant(folder, trace)
    source.mkdir()
    (source / "a.txt").write_text("A text.")
    paths = {"folder": str(folder), "source": str(source), "table": str(tmp_path / "t.lance")}
    action = ACTIONS[what].format(**paths)
    script = textwrap.dedent(WATCH.format(root=str(ROOT), action=action, names=PLANTED))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
    assert not trace.exists()
    # The plant is a plant: who loads it leaves the trace.
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists()


def test_a_folder_with_nothing_but_pickles_is_refused(tmp_path, tiny_model_folder):
    from model.errors import InputError
    from model.folder import weights_hash

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").unlink()
    plant(folder, tmp_path / "trace")
    with pytest.raises(InputError, match="pickled weights are not read"):
        weights_hash(folder)
    assert not (tmp_path / "trace").exists()


def test_a_session_of_our_own_has_no_dashboard_and_no_job_server(ray_session):
    import ray

    assert not ray._private.worker.global_worker.node.webui_url
    with session():  # within the first: nothing new is started
        assert not ray._private.worker.global_worker.node.webui_url


JOIN = """
    import sys
    sys.path.insert(0, {root!r})
    from cluster.session import session
    with session({address!r}):
        import ray
        print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_with_it_and_not_without(tmp_path):
    from clusters import Machines

    token = tmp_path / "token"
    token.write_text("a-token-of-at-least-some-length-0123456789abcdef")
    token.chmod(0o600)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    machines = Machines({"num_cpus": 2}, **own)
    try:
        # By default the dashboard and the job server answer on this machine alone.
        host, port = machines.url.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        with pytest.raises(OSError), socket.create_connection((machines.address.split(":")[0], int(port)), 5):
            pass
        plain = {n: v for n, v in os.environ.items() if not n.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
        script = textwrap.dedent(JOIN.format(root=str(ROOT), address=machines.address))

        def join(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", script]
            return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)

        joined = join(plain | own)
        assert joined.returncode == 0, joined.stderr[-2000:]
        assert joined.stdout.split()[-1] == "42"
        refused = join(plain | {"RAY_AUTH_MODE": "token"})
        assert refused.returncode != 0
        assert "oken" in refused.stderr
        assert token.read_text() not in joined.stdout + joined.stderr + refused.stdout + refused.stderr
    finally:
        machines.stop()
