"""Where bytes lie: local paths and `s3://`, under one configuration that reaches pyarrow, s3fs and Lance alike.

S3 settings come from the standard AWS environment variables, then from the profile's files. Where those name no keys,
each library goes its own usual way (an instance role). Credentials stay out of every message and every repr.
"""

import configparser
import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs

from model.errors import InputError

Format = Literal["parquet", "jsonl", "text"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSED = (".gz", ".zst")
S3 = "s3://"
PROMOTED = "promoted.json"
"""In a place where models are promoted: which of its folders counts."""
MAGIC = "*?["


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source, and what tells whether it changed since."""

    path: str
    """Absolute, or s3://bucket/key."""
    size: int
    """Bytes."""
    mtime_ns: int
    """When it changed last; on a local disk the later of modification and inode change, which nobody can set back."""
    etag: str | None
    """S3's; None on a local disk."""
    format: Format
    relative: str
    """Path below the source as it was named; the file's name where the source is that file."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Endpoint, region and credentials. What is None is left to the library that asks."""

    endpoint: str | None = None
    """URL of a server other than Amazon's."""
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    @property
    def allow_http(self) -> bool:
        return bool(self.endpoint and self.endpoint.startswith("http://"))


def s3_settings() -> S3Settings:
    """The environment's settings; for what it does not say, the profile's (`AWS_PROFILE`, else `default`).

    Raises:
        InputError: the endpoint is no URL, or `AWS_PROFILE` names a profile that does not exist.
    """
    env = os.environ
    profile = _profile()
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise InputError("the S3 endpoint (AWS_ENDPOINT_URL) must begin with http:// or https://")
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or profile.get("region")
    # Keys are taken together from one place: a key of the environment does not go with a secret of a file.
    if env.get("AWS_ACCESS_KEY_ID"):
        keys = [env.get(k) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
    else:
        keys = [profile.get(k) for k in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")]
    # A server of one's own has no regions, but a signature needs one.
    return S3Settings(endpoint.rstrip("/") if endpoint else None, region or ("us-east-1" if endpoint else None), *keys)


def _profile() -> dict[str, str]:
    wanted = os.environ.get("AWS_PROFILE")
    name = wanted or "default"
    found: dict[str, str] = {}
    seen = False
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        path = Path(os.environ.get(variable) or usual).expanduser()
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            # The parser's own message would quote the line, and the line may be a secret.
            raise InputError(
                f"{path} is not a valid AWS configuration file; correct it, or set the AWS_ variables"
            ) from None
        if parser.has_section(section):
            seen = True
            found |= dict(parser.items(section))
    if wanted and not seen:
        raise InputError(f"AWS_PROFILE names {wanted!r}, which no AWS configuration file defines")
    return found


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that a path or URI lies on, and its path there."""
    if not is_s3(uri):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    return _arrow_s3(s3_settings()), uri.removeprefix(S3).rstrip("/")


@lru_cache(maxsize=4)
def _arrow_s3(settings: S3Settings) -> pafs.FileSystem:
    options: dict[str, Any] = {"request_timeout": 60, "connect_timeout": 10}
    if settings.endpoint:
        scheme, _, host = settings.endpoint.partition("://")
        options |= {"scheme": scheme, "endpoint_override": host}
    if settings.region:
        options["region"] = settings.region
    if settings.access_key:
        options |= {"access_key": settings.access_key, "secret_key": settings.secret_key}
        options |= {"session_token": settings.session_token} if settings.session_token else {}
    return pafs.S3FileSystem(**options)


def s3fs_filesystem(**options: Any) -> Any:
    """An `s3fs.S3FileSystem` under the same settings, without a cache of listings: another process may write.

    Args:
        options: further arguments of `S3FileSystem`, as `config_kwargs` for timeouts.
    """
    import s3fs

    settings = s3_settings()
    client = {key: value for key, value in (("region_name", settings.region),) if value}
    return s3fs.S3FileSystem(
        key=settings.access_key,
        secret=settings.secret_key,
        token=settings.session_token,
        endpoint_url=settings.endpoint,
        client_kwargs=client,
        use_listings_cache=False,
        **options,
    )


def lance_options(uri: str) -> dict[str, str] | None:
    """Lance's `storage_options` for a table; None on a local disk. Never store or log them."""
    if not is_s3(uri):
        return None
    settings = s3_settings()
    options = {
        "aws_access_key_id": settings.access_key,
        "aws_secret_access_key": settings.secret_key,
        "aws_session_token": settings.session_token,
        "aws_region": settings.region,
        "aws_endpoint": settings.endpoint,
    }
    if settings.endpoint:
        options |= {"allow_http": str(settings.allow_http).lower(), "aws_virtual_hosted_style_request": "false"}
    return {key: value for key, value in options.items() if value}


def format_of(path: str) -> Format | None:
    """What a file is, by its name: `notes.MD` is text, `x.jsonl.gz` is JSON Lines, `x.csv` is None."""
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSED:
        kind = FORMATS.get(os.path.splitext(stem)[1])
        return None if kind == "parquet" else kind
    return FORMATS.get(extension)


def list_sources(source: str) -> list[SourceFile]:
    """The files of a source, sorted by path.

    Args:
        source: a file, a folder (all below it; names that begin with a dot are skipped), a glob, or the same on S3.
            In folders and globs, files of other kinds are passed over.

    Raises:
        InputError: nothing there, nothing of a known kind, or S3 refuses.
    """
    found = _list_s3(source) if is_s3(source) else _list_local(source)
    files = sorted(found, key=lambda file: file.path)
    if not files:
        known = ", ".join(FORMATS)
        raise InputError(f"{source} holds no file of a known kind ({known}); name another file, folder or glob")
    return files


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _list_local(source: str) -> Iterable[SourceFile]:
    path = os.path.abspath(os.path.expanduser(source))
    if os.path.isfile(path):
        root, names = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root = path
        names = [os.path.join(folder, name) for folder, _, inside in os.walk(path) for name in inside]
    elif any(c in source for c in MAGIC):
        root = _fixed_part(path)
        names = [name for name in glob.iglob(path, recursive=True) if os.path.isfile(name)]
    else:
        raise InputError(f"the source {source} does not exist; name a file, a folder, a glob or an s3:// prefix")
    for name in names:
        relative = os.path.relpath(name, root).replace(os.sep, "/")
        kind = format_of(name)
        if kind is None or (name != path and _hidden(relative)):
            continue
        try:
            status = os.stat(name)
        except FileNotFoundError:  # a dangling link
            continue
        changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
        yield SourceFile(name, status.st_size, changed_ns, None, kind, relative)


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard: /data/2024-*/x.txt gives /data."""
    first = min(pattern.find(c) for c in MAGIC if c in pattern)
    return pattern[:first].rpartition("/")[0]


def _list_s3(source: str) -> Iterable[SourceFile]:
    path = source.removeprefix(S3).rstrip("/")
    if not path or path.startswith("/"):
        raise InputError(f"{source} names no bucket; write s3://bucket/prefix")
    pattern = any(c in path for c in MAGIC)
    root = _fixed_part(path) if pattern else path
    found = _find_s3(path, source, pattern=pattern)
    if not found:
        raise InputError(
            f"the source {source} does not exist; name an object, a prefix or a glob that matches something"
        )
    for name, info in found.items():
        relative = os.path.basename(name) if name == path else name.removeprefix(root).lstrip("/")
        kind = format_of(name)
        if info.get("type") != "file" or kind is None or (name != path and _hidden(relative)):
            continue
        modified = info.get("LastModified")
        mtime_ns = int(modified.timestamp()) * 1_000_000_000 if modified else 0
        yield SourceFile(S3 + name, int(info["size"]), mtime_ns, _etag(info), kind, relative)


def _find_s3(path: str, source: str, *, pattern: bool) -> dict[str, dict[str, Any]]:
    """Objects below a prefix, or that a pattern matches, by bucket/key; empty where there are none."""
    s3 = s3fs_filesystem()
    try:
        return s3.glob(path, detail=True) if pattern else s3.find(path, detail=True)
    except FileNotFoundError:
        return {}
    except (PermissionError, OSError, ValueError) as error:
        raise InputError(
            f"{source} cannot be listed: {first_words(error)}; check bucket, endpoint and credentials"
        ) from None
    except Exception as error:  # botocore's own: no credentials, no route to the endpoint
        raise InputError(f"{source} cannot be listed: {first_words(error)}") from None


def cache_folder(kind: str) -> Path:
    """Where this machine keeps copies of what lies on S3: in $NIGHTLOOM_CACHE, else in ~/.cache/nightloom."""
    return Path(os.environ.get("NIGHTLOOM_CACHE") or "~/.cache/nightloom").expanduser() / kind


def promoted_model(folder_or_id: str) -> str:
    """The model that counts in a place where `nightloom promote` put some, local or s3://; anything else as it is.

    Raises:
        InputError: what says which one counts is damaged.
    """
    try:
        files, path = filesystem(folder_or_id)
        with files.open_input_stream(f"{path}/{PROMOTED}") as stream:
            pointer = stream.read()
    except OSError:  # none there, or a place that cannot be read: whoever reads the model says so
        return folder_or_id
    try:
        return f"{folder_or_id.rstrip('/')}/{json.loads(pointer)['model']}"
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder_or_id}/{PROMOTED} is damaged; promote a model again") from None


def local_model(folder_or_id: str) -> str:
    """A model where this machine can read it: an s3:// folder is copied into a cache, anything else stays as it is.
    Where models are promoted, it is the one that counts.

    The copy is named by the names, sizes and ETags of the objects: a model that changes gets a new one, one that did
    not is not fetched again. Only JSON and safetensors are copied.

    Raises:
        InputError: nothing there, or no permission to read it.
    """
    folder_or_id = promoted_model(folder_or_id)
    if not is_s3(folder_or_id):
        return folder_or_id
    root = folder_or_id.removeprefix(S3).rstrip("/")
    found = _find_s3(root, folder_or_id, pattern=False)
    wanted = {
        n: i
        for n, i in sorted(found.items())
        if n.endswith((".json", ".safetensors")) and n.startswith(root + "/") and ".." not in n.split("/")
    }
    if root + "/config.json" not in wanted and root + "/modules.json" not in wanted:
        raise InputError(f"{folder_or_id} holds no model: config.json is missing; name the prefix of a model folder")
    described = json.dumps([(n, i["size"], _etag(i)) for n, i in wanted.items()])
    name = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    cache = cache_folder("models")
    if (cache / name).is_dir():
        return str(cache / name)
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    s3 = s3fs_filesystem()
    try:
        for key in wanted:
            target = staging / key.removeprefix(root + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.get_file(key, str(target))
        # Of several processes that copy at once the first one's folder stays.
        with contextlib.suppress(FileExistsError, OSError):
            staging.rename(cache / name)
    except Exception as error:
        raise InputError(f"{folder_or_id} cannot be read: {first_words(error)}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return str(cache / name)


def _etag(info: dict[str, Any]) -> str | None:
    tag = info.get("ETag")
    return tag.strip('"') if tag else None


def first_words(error: BaseException) -> str:
    """The first line of an error, without any credential of the settings in use."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def last_words(error: BaseException) -> str:
    """The last line of an error (what Ray wraps ends with its cause), without any credential."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[-1][:500])


def without_secrets(text: str) -> str:
    """A text without any credential of the settings in use."""
    settings = s3_settings()
    for secret in (settings.secret_key, settings.session_token, settings.access_key):
        if secret:
            text = text.replace(secret, "***")
    return text
