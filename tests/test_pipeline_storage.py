"""Sources on a local disk and on a real S3 server, and one configuration for every library that asks."""

import os
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import InputError
from pipeline import storage
from pipeline.columns import DocumentColumns
from pipeline.documents import read_documents
from pipeline.storage import (
    filesystem,
    format_of,
    lance_options,
    list_sources,
    local_model,
    s3_settings,
    s3fs_filesystem,
)

SECRET = "marked-secret-9f8e7d"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_formats() -> None:
    assert format_of("/a/B.PARQUET") == "parquet"
    assert [format_of(x) for x in ("x.json", "x.ndjson.zst", "x.jsonl.gz")] == ["jsonl"] * 3
    assert [format_of(x) for x in ("x.md", "x.rst", "x.text", "x.txt.gz")] == ["text"] * 4
    assert [format_of(x) for x in ("x.csv", "x", "x.parquet.gz", "x.gz")] == [None] * 4


def test_folders_files_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "corpus"
    make(root, "b.txt", "a/c.md", "a/z/d.jsonl.gz", "a/skip.csv", ".git/x.txt", "a/.hidden.txt", "_SUCCESS", "w[1].txt")
    (root / "dangling.txt").symlink_to(root / "nowhere")
    files = list_sources(str(root))
    assert [f.relative for f in files] == ["a/c.md", "a/z/d.jsonl.gz", "b.txt", "w[1].txt"]
    assert [f.path for f in files] == sorted(str(root / f.relative) for f in files)
    assert (files[2].size, files[2].etag, files[2].format) == (5, None, "text")
    status = (root / "b.txt").stat()
    assert files[2].mtime_ns == max(status.st_mtime_ns, status.st_ctime_ns)
    assert [f.relative for f in list_sources(str(root / "**" / "*.[mj]*"))] == ["a/c.md", "a/z/d.jsonl.gz"]
    assert [f.relative for f in list_sources(str(root / "w[1].txt"))] == ["w[1].txt"]
    assert [f.relative for f in list_sources(str(root / "a/.hidden.txt"))] == [".hidden.txt"]
    monkeypatch.chdir(root)
    assert list_sources("a") == list_sources(str(root / "a"))
    assert [f.relative for f in list_sources("*.txt")] == ["b.txt", "w[1].txt"]


def test_sources_that_are_none(tmp_path: Path) -> None:
    make(tmp_path / "only", "x.csv")
    with pytest.raises(InputError, match="does not exist"):
        list_sources(str(tmp_path / "nowhere"))
    for source in (tmp_path / "only", tmp_path / "only/x.csv", tmp_path / "only/*.txt"):
        with pytest.raises(InputError, match="no file of a known kind"):
            list_sources(str(source))
    with pytest.raises(InputError, match="no bucket"):
        list_sources("s3://")


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3_settings() == storage.S3Settings()
    assert lance_options("s3://b/t") == {}
    assert lance_options("/local") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    settings = s3_settings()
    assert (settings.endpoint, settings.region) == ("http://127.0.0.1:9", "us-east-1")
    assert SECRET not in repr(settings)
    assert lance_options("s3://b/t") == {
        "aws_access_key_id": "key",
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
        "aws_endpoint": "http://127.0.0.1:9",
        "allow_http": "true",
        "aws_virtual_hosted_style_request": "false",
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(InputError, match="http://"):
        s3_settings()


def test_settings_from_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text("[profile night]\nregion = eu-west-1\nendpoint_url = https://s3.example\n")
    (tmp_path / "aws-credentials").write_text(f"[night]\naws_access_key_id = k%1\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_PROFILE", "night")
    settings = s3_settings()
    assert (settings.endpoint, settings.region) == ("https://s3.example", "eu-west-1")
    assert (settings.access_key, settings.secret_key) == ("k%1", SECRET)
    # Keys of the environment do not mix with those of a file.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    assert (s3_settings().access_key, s3_settings().secret_key) == ("other", None)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match="'nobody'"):
        s3_settings()
    (tmp_path / "aws-credentials").write_text(f"{SECRET} = no section\n")
    with pytest.raises(InputError) as failure:
        s3_settings()
    assert SECRET not in str(failure.value)


def test_s3_through_every_library(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3 = s3fs_filesystem()
    s3.pipe("bucket/flow/in/a.txt", b"alpha")
    s3.pipe("bucket/flow/in/.hidden/b.txt", b"hidden")
    s3.pipe("bucket/flow/in/sub/c.jsonl", b'{"id": "c1", "text": "gamma"}\n')
    pq.write_table(pa.table({"text": ["delta", "epsilon"]}), tmp_path / "d.parquet")
    s3.put(str(tmp_path / "d.parquet"), "bucket/flow/in/d.parquet")

    files = list_sources("s3://bucket/flow/in/")
    assert [f.relative for f in files] == ["a.txt", "d.parquet", "sub/c.jsonl"]
    assert files[0].path == "s3://bucket/flow/in/a.txt"
    assert files[0].size == 5
    assert all(f.etag and '"' not in f.etag for f in files)
    documents = pa.concat_tables([t for f in files for t in read_documents(f, DocumentColumns())])
    assert documents["document_id"].to_pylist() == ["a.txt", "d.parquet#0", "d.parquet#1", "c1"]
    assert documents["text"].to_pylist() == ["alpha", "delta", "epsilon", "gamma"]
    assert [f.relative for f in list_sources("s3://bucket/flow/**/*.jsonl")] == ["in/sub/c.jsonl"]
    assert [f.relative for f in list_sources("s3://bucket/flow/in/a.txt")] == ["a.txt"]
    # What changed is seen: no listing is remembered, and the ETag tells.
    s3.pipe("bucket/flow/in/a.txt", b"ALPHA")
    assert list_sources("s3://bucket/flow/in/")[0].etag != files[0].etag

    uri = "s3://bucket/flow/t.lance"
    lance.write_dataset(pa.table({"x": [1, 2]}), uri, storage_options=lance_options(uri))
    assert lance.dataset(uri, storage_options=lance_options(uri)).count_rows() == 2
    files_there, path = filesystem(uri)
    assert files_there.get_file_info(path).type == pa.fs.FileType.Directory

    with pytest.raises(InputError, match="does not exist"):
        list_sources("s3://bucket/nothing/")


def test_s3_errors_keep_the_secret(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (s3_server | {"AWS_SECRET_ACCESS_KEY": SECRET}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="cannot be listed") as failure:
        list_sources("s3://bucket/flow/")
    assert SECRET not in str(failure.value)
    file = storage.SourceFile("s3://bucket/x.parquet", 1, 0, None, "parquet", "x.parquet")
    with pytest.raises(InputError, match="cannot be read") as failure:
        list(read_documents(file, DocumentColumns()))
    assert SECRET not in str(failure.value)


def test_a_model_on_s3(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_folder: Path
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NIGHTLOOM_CACHE", str(tmp_path / "cache"))
    s3 = s3fs_filesystem()
    s3.put(str(tiny_model_folder), "bucket/models/tiny", recursive=True)
    s3.pipe("bucket/models/tiny/pytorch_model.bin", b"never copied")
    copy = Path(local_model("s3://bucket/models/tiny/"))
    assert (copy / "model.safetensors").read_bytes() == (tiny_model_folder / "model.safetensors").read_bytes()
    assert (copy / "1_Pooling" / "config.json").is_file()
    assert not (copy / "pytorch_model.bin").exists()
    assert local_model("s3://bucket/models/tiny") == str(copy)
    s3.pipe("bucket/models/tiny/config_sentence_transformers.json", b"{}")
    assert local_model("s3://bucket/models/tiny") != str(copy)
    assert not list((tmp_path / "cache" / "models").glob(".*"))
    with pytest.raises(InputError, match="holds no model"):
        local_model("s3://bucket/models/none")
    assert local_model("models/here") == "models/here"
