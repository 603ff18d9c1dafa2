"""`nightloom submit`: a command of this checkout as a job on a Ray cluster.

What can be wrong is found before anything is uploaded: the command is read by the parser that the job will use, its
files are packed, its paths must mean the same on the cluster. The job's name says what it writes and in which night, so
that the cluster itself refuses to run the same night twice at once.
"""

import hashlib
import os
import re
import shlex
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.checkout import SUBMITTED, Unfit, check_size, list_files, pack
from cluster.session import ADDRESS, QUIET
from jobs.commands import ROOT
from jobs.configuration import parse_value, place, read_toml
from jobs.follow import REPORTING, VERSIONS, Followed, Listed, describe, follow, reach, submitted
from model.errors import InputError

PLACES = ("table", "output", "tokens")
"""Arguments and settings that say where a command writes, the first that it has."""
READ = ("source", "model")
"""Arguments that may be a part of the checkout."""
LOCAL = ("submit", "attach", "jobs", "stop")
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)
STOP_WAIT_S = 120
"""How long a job that is stopped may take before it is killed: a training writes its checkpoint."""
MOST_RUNS = 100
"""Jobs of one name in a night."""
DAY_BEGINS = timedelta(hours=12)
"""A night is called by the day on whose evening it began: 23:00 and 02:00 after it are one night."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line of `nightloom submit` said."""

    words: Sequence[str]
    address: str | None = None
    detach: bool = False
    attach: bool = False
    install: bool = False
    excludes: Sequence[str] = ()
    env: Sequence[str] = ()


@dataclass(slots=True)
class Command:
    """A command that makes sense on a cluster."""

    words: list[str]
    """As the job runs it."""
    name: str
    place: str = ""
    """Where it writes, if it says so; a night has many such places."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Its configuration, by its name in the archive."""
    as_json: bool = False


def run_submit(request: Request) -> Followed | Listed:
    """Submit a command and follow it to its end, or come back at once.

    Raises:
        InputError: the command, the checkout or the address is wrong, or the job of this night runs already.
        Ended: see `jobs.follow.follow`.
    """
    if not (ROOT / "pyproject.toml").exists():
        raise InputError("nightloom is installed here without its checkout; submit from a checkout")
    files = list_files(ROOT, request.excludes)
    command = read_command(request.words, files)
    variables = read_variables(request.env)
    try:
        check_size(ROOT, files)
    except Unfit as error:
        raise InputError(str(error)) from None
    client = reach(request.address)
    with tempfile.TemporaryDirectory(prefix="nightloom-submit-") as folder:
        archive = pack(ROOT, files, command.files, Path(folder) / "checkout.zip")
        job, is_new = start(client, command, environment(archive, variables, install=request.install), request.attach)
    if request.detach and is_new:
        return Listed("submit", "submitted", [describe(client.get_job_info(job))])
    return follow(client, job, as_json=command.as_json)


def start(client: Any, command: Command, runtime_env: dict[str, Any], attach: bool) -> tuple[str, bool]:
    """Give the job to the cluster: its id, and whether it is a new one.

    Raises:
        InputError: it runs already, and is not to be followed instead.
    """
    name = job_name(command, datetime.now())
    for _ in range(MOST_RUNS):
        earlier = [info for info in submitted(client) if re.fullmatch(rf"{re.escape(name)}(-\d+)?", info.submission_id)]
        for info in earlier:
            if not info.status.is_terminal():
                if attach:
                    return info.submission_id, False
                begun = describe(info)["started"] or "now"
                raise InputError(
                    f"{info.submission_id} runs already, since {begun}: nightloom attach {info.submission_id}"
                )
        job = name if not earlier else f"{name}-{len(earlier) + 1}"
        try:
            client.submit_job(
                entrypoint=f"exec python -m jobs.cli {shlex.join(command.words)}",
                submission_id=job,
                runtime_env=runtime_env,
                metadata={"nightloom": command.name},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            continue  # somebody else was faster: look again
        return job, True
    raise InputError(f"{MOST_RUNS} jobs {name} were submitted in this night")


def job_name(command: Command, now: datetime) -> str:
    """Says what is written and in which night: "embed-corpus-1f0c22-2026-11-27"."""
    digest = hashlib.blake2b((command.place or shlex.join(command.words)).encode(), digest_size=3).hexdigest()
    stem = re.sub(
        r"[^A-Za-z0-9]+", "-", command.place.rstrip("/").rpartition("/")[2].rpartition(".")[0] or command.place
    )
    parts = (command.name, stem.strip("-")[-40:], digest, str((now - DAY_BEGINS).date()))
    return "-".join(part for part in parts if part)


def read_command(words: Sequence[str], files: Sequence[Path]) -> Command:
    """What a command means on a cluster.

    Args:
        files: what of the checkout is sent.

    Raises:
        InputError: it is wrong, or names a path that only this machine has.
    """
    from jobs.cli import make_parser

    if not words:
        raise InputError("submit needs a command: nightloom submit -- embed SOURCE TABLE")
    options = make_parser().parse_args(list(words))
    if options.command in LOCAL:
        raise InputError(f"{options.command} is a command for this machine, not for a cluster")
    command = Command(list(words), options.command, as_json=options.json)
    tree: dict[str, Any] = {}
    if file := getattr(options, "config", None):
        tree = read_toml(file)
        sent = f"{SUBMITTED}/{Path(file).name}"
        command.files[sent] = Path(file).read_bytes()
        replace_word(command.words, file, sent)
    for item in getattr(options, "set", []):
        key, _, text = item.partition("=")
        place(tree, key.strip(), parse_value(text.strip()))
    named = {**tree, **{key: value for key, value in vars(options).items() if isinstance(value, str)}}
    tables = named.pop("tables", {})
    for settings in (named, *(tables.values() if isinstance(tables, dict) else ())):
        for name in (*READ, *PLACES, "destination"):
            if isinstance(value := settings.get(name), str):
                check_path(name, value, command, files)
        command.place += next((f" {settings[name]}" for name in PLACES if settings.get(name)), "")
    command.place = command.place.strip()
    return command


def check_path(name: str, value: str, command: Command, files: Sequence[Path]) -> None:
    """A path must be the same for every machine of the cluster; one of the checkout becomes one of the archive.

    Raises:
        InputError: it is not.
    """
    if "://" in value or Path(value).is_absolute():
        return
    if name in READ:
        path = Path(os.path.normpath(Path.cwd() / value))
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else None
        if relative and any(file.is_relative_to(relative) for file in files):
            replace_word(command.words, value, str(relative))
            return
        if name == "model" and not path.exists():
            return  # a hub id
    raise InputError(
        f"{name} {value!r} is a path on this machine; for a cluster name an s3:// prefix, or an absolute path that all "
        "of its machines have"
    )


def replace_word(words: list[str], before: str, after: str) -> None:
    for at, word in enumerate(words):
        if word == before:
            words[at] = after
        elif word.startswith("--") and word.endswith(f"={before}"):
            words[at] = f"{word.partition('=')[0]}={after}"


def read_variables(items: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE each.

    Raises:
        InputError: no value, or a secret, which everybody who sees the dashboard would see.
    """
    variables = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--env {item!r} has no value; write --env NAME=VALUE")
        if SECRET.search(name):
            raise InputError(
                f"--env {name}: the dashboard shows a job's variables; give the machines a role or a secret"
            )
        variables[name] = value
    return variables


def environment(archive: Path, variables: Mapping[str, str], *, install: bool) -> dict[str, Any]:
    """The runtime environment of a job: this checkout, the cluster it is in, the versions it was tested with."""
    pins = pinned_versions()
    quiet = {**QUIET, ADDRESS: "auto", REPORTING: "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    return {
        "working_dir": str(archive),
        "env_vars": {**quiet, VERSIONS: " ".join(f"{name}=={version}" for name, version in pins.items()), **variables},
        **({"pip": {"packages": pinned_requirements(pins), "pip_check": False}} if install else {}),
    }


def product_requirements() -> list[Any]:
    """What pyproject.toml says nightloom needs on a machine like this."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = [Requirement(item) for item in tomllib.loads(text)["project"]["dependencies"]]
    return [item for item in found if item.marker is None or item.marker.evaluate()]


def pinned_versions() -> dict[str, str]:
    """{package: the version of constraints.txt} for what nightloom needs itself."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    names = [item.name.lower().replace("_", "-") for item in product_requirements()]
    return {name: exact[name] for name in names if name in exact}


def pinned_requirements(pins: Mapping[str, str]) -> list[str]:
    """The same as pip reads them, with extras."""
    extras = {item.name.lower().replace("_", "-"): sorted(item.extras) for item in product_requirements()}
    return [
        f"{name}[{','.join(extras[name])}]=={pin}" if extras[name] else f"{name}=={pin}" for name, pin in pins.items()
    ]


def check_versions(pins: str) -> None:
    """Compare what is installed here, in the job, with what the checkout was tested with.

    Raises:
        InputError: something differs.
    """
    differing = []
    for pin in pins.split():
        name, _, wanted = pin.partition("==")
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            differing.append(f"{name} {found} for {wanted}")
    if differing:
        raise InputError(
            f"the cluster's packages are not those of the checkout ({', '.join(differing)}); "
            "rebuild its image, or submit with --install"
        )
