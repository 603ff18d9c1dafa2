"""`nightloom quantize`: a model folder with int8 weights, kept only if its vectors are still those of the float model.

What is saved is what is measured: the new folder is loaded as any reader loads it, and its vectors of a sample of texts
are compared with the float model's in float32. Below the bounds it is removed again, and the exit status is 3.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jobs.commands import ROOT
from model.errors import InputError

SAMPLE = str(ROOT / "corpus" / "documents.parquet")
TEXTS = 128
MOST_CHARS = 4_000
"""A text of the sample is cut here: enough for long-range attention, seconds for the whole sample."""
MIN_COSINE, MIN_CENTRED = 0.99, 0.98
"""Of the mean over the sample. The centred cosine (the mean vector taken off both) is the stricter one: vectors of many
models lie close together."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What a quantized model is beside the float one."""

    job: str
    status: str
    """"done", or "unpublished": the vectors differ too much, and nothing was kept."""
    model: str
    out: str
    reason: str
    texts: int
    cosine_mean: float
    cosine_min: float
    centred_cosine_mean: float
    same_nearest: float
    """Share of the texts whose nearest other text is the same."""
    bytes_before: int
    bytes_after: int
    """Of the weight files."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        verdict = f"{self.out}: int8" if self.status == "done" else f"{self.out} was not kept: {self.reason}"
        return (
            f"{verdict}\n"
            f"{self.bytes_after / 1e6:.1f} MB of weights, from {self.bytes_before / 1e6:.1f}; against float32 on "
            f"{self.texts} texts: cosine {self.cosine_mean:.5f} (least {self.cosine_min:.5f}), centred "
            f"{self.centred_cosine_mean:.5f}, the same nearest text for {self.same_nearest:.0%}"
        )


def run_quantize(
    model: str,
    out: str,
    *,
    sample: str = SAMPLE,
    min_cosine: float = MIN_COSINE,
    min_centred: float = MIN_CENTRED,
) -> QuantizeReport:
    """Write `out`, a folder like `model` with int8 weights.

    Args:
        model: folder (s3:// too) or hub id of an encoder with float weights.
        out: a local folder that does not exist yet.
        sample: texts to compare on, as for `nightloom embed`; the bundled corpus by default.

    Raises:
        InputError: no such model, one in int8 already, `out` taken, too few texts.
    """
    from model.embedder import Embedder
    from model.folder import read_folder
    from model.quantized import quantize
    from model.weights import load_encoder, save_folder
    from pipeline.storage import local_model

    folder = read_folder(local_model(model))
    if folder.int8:
        raise InputError(f"{model} has int8 weights already; give the float model")
    target = Path(out)
    if target.exists():
        raise InputError(f"{out} exists already; name a folder that does not")
    texts = sample_texts(sample)
    exact = Embedder(folder.path, device="cpu", dtype="float32").encode(texts, normalize_embeddings=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        made = save_folder(
            quantize(load_encoder(folder)),
            Path(temporary) / "model",
            tokenizer_from=folder.path,
            **folder.sentence_options(),
        )
        vectors = Embedder(made, device="cpu").encode(texts, normalize_embeddings=True)
        found = compare(vectors, exact)
        reason = refusal(found, min_cosine, min_centred)
        after = sum(file.stat().st_size for file in read_folder(made).weight_files)
        if not reason:
            shutil.move(made, target)
    return QuantizeReport(
        job="quantize",
        status="unpublished" if reason else "done",
        model=model,
        out=out,
        reason=reason,
        texts=len(texts),
        bytes_before=sum(file.stat().st_size for file in folder.weight_files),
        bytes_after=after,
        **found,
    )


def sample_texts(source: str, count: int = TEXTS) -> list[str]:
    """So many texts of a source, evenly over its documents in their order."""
    from pipeline.columns import DocumentColumns
    from pipeline.documents import read_documents
    from pipeline.storage import list_sources

    texts = [
        text.strip()[:MOST_CHARS]
        for file in list_sources(source)
        for part in read_documents(file, DocumentColumns(), with_carried=False)
        for text in part["text"].to_pylist()
        if text and text.strip()
    ]
    if len(texts) < 3:
        raise InputError(f"{source} has {len(texts)} texts; three are needed to compare models")
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int)]


def compare(ours: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Cosines of unit vectors to the exact ones, plain and with the exact mean taken off both; nearest others."""
    cosine = (ours * exact).sum(axis=1)
    a, b = (x - exact.mean(axis=0) for x in (ours, exact))
    centred = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    nearest = []
    for x in (ours, exact):
        likeness = x @ x.T
        np.fill_diagonal(likeness, -2)
        nearest.append(likeness.argmax(axis=1))
    found = {
        "cosine_mean": cosine.mean(),
        "cosine_min": cosine.min(),
        "centred_cosine_mean": centred.mean(),
        "same_nearest": (nearest[0] == nearest[1]).mean(),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def refusal(found: dict[str, float], min_cosine: float, min_centred: float) -> str:
    """Why the vectors are not good enough; empty where they are. NaN is never good enough."""
    for name, least in (("cosine_mean", min_cosine), ("centred_cosine_mean", min_centred)):
        if not found[name] >= least:
            return f"its {name.replace('_', ' ')} to the float model is {found[name]:.5f}, below {least}"
    return ""
