"""An evaluation: what is asked for, and what came out, as a table for people and as the JSON that a model folder keeps.

`evaluation.json` lies beside the weights and names their hash: a figure belongs to weights, not to a folder's name.
Figures are called `set/system/metric`, and gates call them by that.
"""

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jobs.configuration import Settings, as_names
from jobs.intervals import SAMPLES, Figure, Interval
from jobs.report import clock
from model.errors import InputError
from pipeline.shards import read_file

EVALUATION = "evaluation.json"
FORMAT = 1
PACKAGES = ("nightloom", "torch", "tokenizers", "numpy", "scipy", "scikit-learn", "pytrec-eval-terrier")


class RetrievalSettings(Settings):
    """Questions to be answered by documents."""

    path: str
    """Folder or s3:// prefix in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""
    split: str = "test"
    """Which judgements."""
    modes: Annotated[tuple[Literal["document", "chunk-late", "chunk-none"], ...], BeforeValidator(as_names)] = Field(
        default=("document",), min_length=1
    )
    """Vectors of whole documents; of chunks in their context; of chunks alone. Other systems embed whole documents."""
    long_words: int = Field(default=700, gt=0)
    """Questions whose answers are all longer than so many words (about 1,000 tokens) are a set of their own too."""


class SimilaritySettings(Settings):
    """Pairs of texts that people have scored."""

    path: str
    """Parquet or JSON Lines with sentence1, sentence2 and score."""


class ClassificationSettings(Settings):
    """Labelled texts, on whose vectors a logistic regression is trained."""

    train: str
    """Parquet or JSON Lines with text and label, to train on."""
    test: str
    """The same, to test on."""
    strength: float = Field(default=10.0, gt=0)
    """The inverse of the regularisation (scikit-learn's C)."""


class MaskedSettings(Settings):
    """Held-out text whose tokens are to be guessed."""

    tokens: str
    """Where `nightloom prepare` put token shards of the model's tokenizer, some of them held out."""
    rate: float = Field(default=0.3, gt=0, lt=1)
    """Share of the tokens that is masked."""
    bins: int | None = Field(default=None, gt=0)
    """Most bins of tokens that are looked at; by default all."""


class PeerSettings(Settings):
    """A model to compare with."""

    path: str
    """Model folder or hub id; of another architecture where sentence-transformers is installed."""


class CheaperSettings(Settings):
    """Representations that cost less to keep, whose loss of quality is measured on retrieval."""

    dims: Annotated[tuple[int, ...], BeforeValidator(as_names)] | None = None
    """Leading dimensions (Matryoshka); by default a half and a quarter of the model's."""
    types: Annotated[tuple[Literal["int8", "binary"], ...], BeforeValidator(as_names)] = ("int8", "binary")
    """int8: 127 for the largest component; binary: signs find a hundred, whose whole vectors put them in order."""


class EvaluateConfiguration(Settings):
    """Everything that `nightloom evaluate` can be told."""

    model: str
    """Model folder (s3:// too) or hub id."""
    output: str | None = None
    """File for the JSON, beside the one in the model's folder."""
    keep: bool = True
    """Write evaluation.json into the model's folder, where it is one."""
    retrieval: dict[str, RetrievalSettings] = Field(default_factory=dict)
    similarity: dict[str, SimilaritySettings] = Field(default_factory=dict)
    classification: dict[str, ClassificationSettings] = Field(default_factory=dict)
    masked: dict[str, MaskedSettings] = Field(default_factory=dict)
    lexical: Annotated[tuple[Literal["bm25", "tf-idf"], ...], BeforeValidator(as_names)] = ()
    """Baselines that look at words; tf-idf stands beside similarities and (with a linear SVM) classifications too."""
    peers: dict[str, PeerSettings] = Field(default_factory=dict)
    random_weights: bool = False
    """Compare with the same architecture and tokenizer at random weights."""
    cheaper: CheaperSettings = CheaperSettings()
    chunk_tokens: int = Field(default=256, gt=0)
    """About how long a chunk is, in the chunk modes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the arithmetic."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    samples: int = Field(default=SAMPLES, ge=100)
    """Resamples for each interval."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out."""

    job: str
    status: str
    model: str
    weights: str
    """Hash of the weights that were evaluated."""
    tokenizer: str
    sets: dict[str, dict[str, Any]]
    """Name -> kind, fingerprint of its data, number of items."""
    figures: list[Figure]
    device: str
    dtype: str
    versions: dict[str, str]
    date: str
    seconds: float
    configuration: dict[str, Any]
    format: int = FORMAT

    def to_tree(self) -> dict[str, Any]:
        """As JSON has it; intervals are rounded, for nobody reads the sixth digit."""
        tree = asdict(self)
        for figure in tree["figures"]:
            for key in ("interval", "difference"):
                if figure[key] is not None:
                    figure[key] = {name: round(value, 5) for name, value in figure[key].items()}
        return tree

    def to_json(self) -> str:
        return json.dumps(self.to_tree())

    def summary(self) -> str:
        head = f"{self.model} ({self.weights[:12]}) on {self.device} in {self.dtype}, {clock(self.seconds)}"
        return "\n\n".join([head, *(block(self.figures, name) for name in dict.fromkeys(f.set for f in self.figures))])


def block(figures: Sequence[Figure], name: str) -> str:
    """One set for people: a line for each system and metric, and how far it is from what it is compared with."""
    rows = [(f.system, f.metric, str(f.interval), against(f)) for f in figures if f.set == name]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    counts = sorted({f.num_items for f in figures if f.set == name})
    items = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    lines = [f"{name}, {items} items"]
    last = ""
    for system, metric, figure, difference in rows:
        shown = system if system != last else ""
        line = f"  {shown:<{widths[0]}}  {metric:<{widths[1]}}  {figure:<{widths[2]}}  {difference}"
        lines.append(line.rstrip())
        last = system
    return "\n".join(lines)


def against(figure: Figure) -> str:
    """ "-0.012 (-0.020 to -0.004) against document"."""
    if figure.difference is None:
        return ""
    d = figure.difference
    return f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f}) against {figure.against}"


def read_evaluation(place: str) -> Evaluation | None:
    """The evaluation of a model folder, local or s3://; None where there is none.

    Raises:
        InputError: it is damaged, or of another version of nightloom.
    """
    raw = read_file(place, EVALUATION)
    if raw is None:
        return None
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            raise InputError(f"{place}/{EVALUATION} has format {tree['format']}, not {FORMAT}; evaluate again")
        for figure in tree["figures"]:
            for key in ("interval", "difference"):
                figure[key] = Interval(**figure[key]) if figure[key] is not None else None
        return Evaluation(**{**tree, "figures": [Figure(**figure) for figure in tree["figures"]]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}/{EVALUATION} is damaged ({type(error).__name__}: {error}); evaluate again") from None


def versions() -> dict[str, str]:
    """Of what figures depend on, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
