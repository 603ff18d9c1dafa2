"""`nightloom promote`: a model that passed its gates, under a name that the nightly job can pin.

DESTINATION holds a folder for each model that was promoted, named by a hash of its files, and `promoted.json`, which
says which one counts. A folder is never changed, and the pointer is written last and at once: whoever reads it has a
whole model, before and after. `embed --model DESTINATION` follows the pointer and records the folder that it found.
"""

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pyarrow.fs import FileSelector, LocalFileSystem
from pydantic import Field

from jobs.checkpoints import copy_file, synchronize
from jobs.configuration import Settings, load
from jobs.evaluation import EVALUATION, Evaluation, now, read_evaluation
from jobs.intervals import Figure
from model.errors import InputError
from model.folder import load_tokenizer, read_folder, tokenizer_hash, weights_hash
from pipeline.shards import write_file
from pipeline.storage import PROMOTED, filesystem, is_s3, local_model

KEPT = ("README.md", "LICENSE", "NOTICE")
"""Files of a model folder that go along beside JSON and safetensors."""

Bound = Literal["value", "low", "high", "difference", "difference_low", "difference_high"]


class Gate(Settings):
    """One condition."""

    figure: str
    """Name of a figure, `set/system/metric`, as in "squad/document/ndcg@10"."""
    of: Bound = "value"
    """The figure itself, a bound of its interval, or its difference to what it was compared with."""
    at_least: float | None = None
    at_most: float | None = None


class Gates(Settings):
    """What a gates file holds: `[[gate]]` tables."""

    gate: list[Gate] = Field(min_length=1)
    """Every one of them must hold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A gate and what was found at it."""

    figure: str
    of: str
    wanted: str
    """">= 0.7" or "<= 2.5"."""
    found: float
    missed_by: float
    """0 where the gate holds."""

    def __str__(self) -> str:
        name = self.figure if self.of == "value" else f"{self.of.replace('_', ' ')} of {self.figure}"
        verdict = "holds" if not self.missed_by else f"missed by {self.missed_by:.5f}"
        return f"{name} is {self.found:.5f}, wanted {self.wanted}: {verdict}"


@dataclass(frozen=True, slots=True)
class PromoteReport:
    """What became of a model that was to be promoted."""

    job: str
    status: str
    model: str
    destination: str
    promoted: str | None
    """The folder that counts from now on; None where a gate was missed."""
    weights: str
    outcomes: list[Outcome]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        head = f"{self.model} is now {self.promoted}"
        if self.promoted is None:
            head = f"{self.model} was not promoted; {self.destination} is as it was."
        return "\n".join([head, "", *(f"  {outcome}" for outcome in self.outcomes)])


def run_promote(model: str, destination: str, gates_file: str) -> PromoteReport:
    """Promote a model that carries an evaluation which passes the gates; refuse any other, and change nothing.

    Raises:
        InputError: no model there, no evaluation of these weights, a gate on a figure that it does not have.
    """
    gates = load(Gates, file=gates_file, sets=[], given={}).gate
    place = local_model(model)
    evaluation = evaluation_of(model, place)
    outcomes = [judge(gate, evaluation) for gate in gates]
    passed = not any(outcome.missed_by for outcome in outcomes)
    promoted = publish(place, destination, evaluation, outcomes) if passed else None
    return PromoteReport(
        job="promote",
        status="done" if passed else "unpublished",
        model=model,
        destination=destination,
        promoted=promoted,
        weights=evaluation.weights,
        outcomes=outcomes,
    )


def evaluation_of(model: str, place: str) -> Evaluation:
    """The evaluation that a model folder carries, if it is one of the weights and tokenizer that lie there now.

    Raises:
        InputError: there is none, or it is of others.
    """
    folder = read_folder(place)
    load_tokenizer(folder.path)
    evaluation = read_evaluation(place)
    if evaluation is None:
        raise InputError(f"{model} carries no evaluation ({EVALUATION}); run nightloom evaluate on it first")
    if (evaluation.weights, evaluation.tokenizer) != (weights_hash(place), tokenizer_hash(place)):
        raise InputError(
            f"the evaluation in {model} is of other weights ({evaluation.weights[:12]}) than lie there "
            f"({weights_hash(place)[:12]}); evaluate it again"
        )
    return evaluation


def judge(gate: Gate, evaluation: Evaluation) -> Outcome:
    """Whether a gate holds, and by how much it does not.

    Raises:
        InputError: a figure that was not measured, or a gate without a bound or with two.
    """
    figures = {figure.name: figure for figure in evaluation.figures}
    if gate.figure not in figures:
        nearest = difflib.get_close_matches(gate.figure, figures, n=1, cutoff=0)
        raise InputError(f"a gate is on {gate.figure!r}, which was not measured; the nearest is {nearest[0]!r}")
    if (gate.at_least is None) == (gate.at_most is None):
        raise InputError(f"the gate on {gate.figure!r} needs either at_least or at_most")
    found = look(figures[gate.figure], gate.of)
    if gate.at_least is not None:
        wanted, missed = f">= {gate.at_least:g}", gate.at_least - found
    else:
        assert gate.at_most is not None
        wanted, missed = f"<= {gate.at_most:g}", found - gate.at_most
    return Outcome(gate.figure, gate.of, wanted, found, max(missed, 0.0))


def look(figure: Figure, of: Bound) -> float:
    if of.startswith("difference"):
        if figure.difference is None:
            raise InputError(f"a gate is on the difference of {figure.name!r}, which was compared with nothing")
        interval, part = figure.difference, of.removeprefix("difference").lstrip("_") or "value"
    else:
        interval, part = figure.interval, of
    return float(getattr(interval, part))


def publish(place: str, destination: str, evaluation: Evaluation, outcomes: Sequence[Outcome]) -> str:
    """Copy a model under its hash, unless it lies there already, and let the pointer name it.

    Returns:
        The folder that counts from now on.
    """
    names = model_files(place)
    version = hash_files(place, [name for name in names if name != EVALUATION])
    target = f"{destination.rstrip('/')}/{version}"
    copy = copy_to_s3 if is_s3(destination) else copy_to_disk
    copy(place, names, target)
    pointer: dict[str, Any] = {
        "model": version,
        "weights": evaluation.weights,
        "tokenizer": evaluation.tokenizer,
        "promoted": now(),
        "evaluated": evaluation.date,
        "gates": [asdict(outcome) for outcome in outcomes],
    }
    write_file(destination, PROMOTED, json.dumps(pointer, indent=1).encode() + b"\n")
    return target if is_s3(destination) else os.path.abspath(target)


def model_files(place: str) -> list[str]:
    """The files of a model folder by their path in it: a run's checkpoints that lie beside it stay."""
    folder = Path(place)
    found = [p for pattern in ("*.json", "*.safetensors", "*/config.json", *KEPT) for p in folder.glob(pattern)]
    return sorted(str(p.relative_to(folder)) for p in found if p.is_file() and p.name != PROMOTED)


def hash_files(place: str, names: Sequence[str]) -> str:
    """16 hex digits: blake2b over the names and bytes of files."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        with (Path(place) / name).open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        digest.update(f"{name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def copy_to_disk(place: str, names: Sequence[str], target: str) -> None:
    """A folder that appears whole; one that is there is the same by its name, but for a later evaluation."""
    final = Path(filesystem(target)[1])
    if final.is_dir():
        write_file(str(final), EVALUATION, (Path(place) / EVALUATION).read_bytes())
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        staging.chmod(0o755)
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(place) / name, staging / name)
            synchronize(staging / name)
        staging.rename(final)
        synchronize(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def copy_to_s3(place: str, names: Sequence[str], target: str) -> None:
    """Objects that no pointer names yet: half a copy is nobody's model, and a second one completes it. The name of the
    folder is a hash of all of them, so that one of the right size is the right one.
    """
    files, path = filesystem(target)
    found = files.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    sizes = {info.path.removeprefix(f"{path}/"): info.size for info in found if info.is_file}
    for name in names:
        if name == EVALUATION or sizes.get(name) != (Path(place) / name).stat().st_size:
            copy_file(LocalFileSystem(), str(Path(place) / name), files, f"{path}/{name}")
