"""What is sent to a cluster: what workers need, nothing hidden, nothing from outside, the same bytes each time."""

import zipfile
from pathlib import Path

import pytest

from cluster.checkout import Unfit, check_size, list_files, pack

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    root = tmp_path / "checkout"
    files = {
        "model/encoder.py": "pass",
        "models/small/weights": "w" * 3000,
        "jobs/__pycache__/cli.pyc": "",
        "build/big": "b" * 9000,
        "tests/test_it.py": "",
        ".env": "AWS_SECRET_ACCESS_KEY=x",
        "data/a.bin": "a" * 5000,
        "data/deep/b.bin": "b" * 4000,
        "key.pem": "secret",
        "token": "the cluster's",
        "data/cluster.token": "too",
        "run.sh": "#!/bin/sh",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "run.sh").chmod(0o755)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("root")
    (root / "way_out").symlink_to(outside)
    (root / "passwd").symlink_to(outside / "passwd")
    (root / "inside").symlink_to(root / "run.sh")
    return root


def test_only_what_workers_need_is_sent(checkout):
    sent = [str(path) for path in list_files(checkout)]
    assert sent == ["data/a.bin", "data/deep/b.bin", "inside", "model/encoder.py", "models/small/weights", "run.sh"]


def test_more_can_be_left_out(checkout):
    sent = [str(path) for path in list_files(checkout, ["data/", "models/*"])]
    assert sent == ["inside", "model/encoder.py", "run.sh"]


def test_too_much_is_refused_and_the_largest_folders_are_named(checkout):
    files = list_files(checkout)
    assert check_size(checkout, files) == 5000 + 4000 + 3000 + 4 + 9 + 9
    with pytest.raises(Unfit, match=r"data/a\.bin 0 MB, data/deep 0 MB, models/small 0 MB; leave") as refused:
        check_size(checkout, files, most_bytes=12_000)
    assert "\n" not in str(refused.value)


def test_the_archive_is_the_same_each_time_and_keeps_what_is_executable(checkout, tmp_path):
    files = list_files(checkout)
    first = pack(checkout, files, {"submitted/run.toml": b"x = 1"}, tmp_path / "1.zip").read_bytes()
    (checkout / "run.sh").touch()
    second = pack(checkout, files, {"submitted/run.toml": b"x = 1"}, tmp_path / "2.zip")
    assert second.read_bytes() == first
    with zipfile.ZipFile(second) as archive:
        assert set(archive.namelist()) == {str(path) for path in files} | {"submitted/run.toml"}
        assert archive.read("data/a.bin") == b"a" * 5000
        assert archive.getinfo("run.sh").external_attr >> 16 & 0o111


def test_this_checkout_is_fit_to_be_sent():
    files = list_files(ROOT)
    names = {str(path) for path in files}
    assert {"model/encoder.py", "jobs/cli.py", "pyproject.toml", "constraints.txt"} <= names
    assert any(name.startswith("models/nightloom-small/") for name in names)
    assert not any(name.startswith((".", "tests", "benchmarks", "corpus")) for name in names)
    assert check_size(ROOT, files) < 100_000_000
