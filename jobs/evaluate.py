"""`nightloom evaluate`: what a model is worth, with intervals, on sets that are named, beside systems that are named.

Everything embeds by the stages of the product. Systems that are compared see the same items, so that the interval of
their difference is a paired one. `evaluate` is the same for a training loop, `validate` for Ray Train.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.embedded import ProductModel, TextModel, open_model, random_twin
from jobs.evaluation import (
    EVALUATION,
    EvaluateConfiguration,
    Evaluation,
    now,
    versions,
)
from jobs.evaluation_sets import RetrievalSet, read_labelled, read_retrieval, read_similarity
from jobs.guessing import measure_guessing
from jobs.intervals import Measured, Statistic, make_figures, mean_of
from jobs.lexical import lexical_scorer, needed, tfidf_pairs, tfidf_vectorizer
from jobs.retrieval import dense_scorer, judge, long_queries, rank, unit
from model.errors import InputError
from pipeline.shards import write_file
from pipeline.storage import is_s3, promoted_model

if TYPE_CHECKING:
    import ray.train

log = logging.getLogger(__name__)

OWN = "document"
"""The system that is the model as it comes: a whole document's vector, in float32."""
RANDOM = "random"


def run_evaluate(configuration: EvaluateConfiguration) -> Evaluation:
    """Evaluate a model, and keep what came out beside it.

    Raises:
        InputError: nothing to evaluate on, a set or a model that is wrong.
    """
    begun = time.monotonic()
    check(configuration)
    sets = read_sets(configuration)
    settings: dict[str, Any] = {
        "device": configuration.device,
        "dtype": configuration.dtype,
        "chunk_tokens": configuration.chunk_tokens,
    }
    model = ProductModel(configuration.model, **settings)
    measured: list[Measured] = []
    described: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        systems: dict[str, TextModel] = {OWN: model}
        if configuration.random_weights:
            systems[RANDOM] = open_model(stack.enter_context(random_twin(configuration.model)), **settings)
        for name, peer in configuration.peers.items():
            systems[name] = open_model(peer.path, **settings)
        for name, (kind, data) in sets.items():
            log.info("%s (%s)", name, kind)
            found = list(MEASURE[kind](name, data, configuration, systems))
            measured += found
            described[name] = {"kind": kind, "fingerprint": data.fingerprint, "items": found[0].num_items}
    for name, masked in configuration.masked.items():
        found, fingerprint = measure_guessing(
            name,
            configuration.model,
            masked.tokens,
            device=configuration.device,
            dtype=configuration.dtype,
            rate=masked.rate,
            max_bins=masked.bins,
        )
        measured += found
        described[name] = {"kind": "masked", "fingerprint": fingerprint, "items": found[0].num_items}
    against = {m.system: OWN for m in measured if m.system != OWN} | {"chunk-late": "chunk-none"}
    figures = make_figures(
        measured,
        against=against,
        baselines=(RANDOM, *configuration.lexical, *configuration.peers),
        seed=configuration.seed,
        samples=configuration.samples,
    )
    evaluation = Evaluation(
        job="evaluate",
        status="done",
        model=configuration.model,
        weights=model.embedder.weights_hash,
        tokenizer=model.embedder.tokenizer_hash,
        sets=described,
        figures=figures,
        device=str(model.embedder.device),
        dtype=str(model.embedder.dtype).removeprefix("torch."),
        versions=versions(),
        date=now(),
        seconds=round(time.monotonic() - begun, 2),
        configuration=configuration.model_dump(mode="json"),
    )
    keep(evaluation, configuration)
    return evaluation


def check(configuration: EvaluateConfiguration) -> None:
    """Refuse what is known to be wrong before anything is read.

    Raises:
        InputError: no set; a name that stands for two things, or that a figure's name could not hold.
    """
    groups = ("retrieval", "similarity", "classification", "masked")
    names = [name for group in groups for name in getattr(configuration, group)]
    if not names:
        raise InputError(
            "nothing to evaluate on; name a set, as in --set retrieval.NAME.path=FOLDER (see nightloom evaluate "
            "--settings)"
        )
    own = {OWN, RANDOM, "chunk-late", "chunk-none", "masked", "bm25", "tf-idf"}
    for name in [*names, *configuration.peers]:
        if "/" in name or names.count(name) > 1:
            raise InputError(
                f"the name {name!r} stands for two sets or has a slash in it; name sets and peers otherwise"
            )
    for name in configuration.peers:
        if name in own or "+" in name:
            raise InputError(f"a peer cannot be called {name!r}; call it something else")


def read_sets(configuration: EvaluateConfiguration) -> dict[str, tuple[str, Any]]:
    """Name -> kind and data of every set but masked ones: a line that is wrong is said before hours of embedding."""
    sets: dict[str, tuple[str, Any]] = {}
    for name, retrieval in configuration.retrieval.items():
        sets[name] = ("retrieval", read_retrieval(retrieval.path, retrieval.split))
    for name, similarity in configuration.similarity.items():
        sets[name] = ("similarity", read_similarity(similarity.path))
    for name, labelled in configuration.classification.items():
        sets[name] = ("classification", read_labelled(labelled.train, labelled.test))
    return sets


def keep(evaluation: Evaluation, configuration: EvaluateConfiguration) -> None:
    """Write the JSON into the model's folder, unless it is a hub id, and where else it was asked for."""
    data = (evaluation.to_json() + "\n").encode()
    model = promoted_model(configuration.model)
    if configuration.keep and (is_s3(model) or Path(model).is_dir()):
        write_file(model, EVALUATION, data)
    if configuration.output:
        folder, _, name = configuration.output.rpartition("/")
        write_file(folder or ".", name, data)


# Kinds of sets


def measure_retrieval(
    name: str, data: RetrievalSet, configuration: EvaluateConfiguration, systems: Mapping[str, TextModel]
) -> Iterator[Measured]:
    """The model in each mode and, in its first one, in each cheaper representation; then every other system."""
    settings = configuration.retrieval[name]
    is_long = long_queries(data, settings.long_words)

    def measure(system: str, scorer: Callable[[slice], np.ndarray]) -> Iterator[Measured]:
        log.info("%s: %s", name, system)
        values = judge(rank(scorer, data), data)
        yield from (Measured(name, system, metric, len(v), mean_of(v)) for metric, v in values.items())
        if is_long.any() and not is_long.all():
            long = f"{name}-long"
            for metric, v in values.items():
                yield Measured(long, system, metric, int(is_long.sum()), mean_of(v[is_long]))

    for system, model in systems.items():
        queries = model.queries(data.queries)
        for mode in settings.modes if system == OWN else (OWN,):
            rows, first = model.documents(data.documents, mode)
            label = mode if system == OWN else system
            yield from measure(label, dense_scorer(queries, rows, first))
            if label == settings.modes[0]:
                for cheaper in representations(configuration, model.dim):
                    yield from measure(f"{label}+{cheaper}", dense_scorer(queries, rows, first, cheaper))
    for lexical in configuration.lexical:
        yield from measure(lexical, lexical_scorer(lexical, data.documents, data.queries))


def representations(configuration: EvaluateConfiguration, dim: int) -> list[str]:
    """The cheaper representations, by their names in `dense_scorer`.

    Raises:
        InputError: more dimensions than the model gives.
    """
    dims = configuration.cheaper.dims
    chosen = dims if dims is not None else tuple(d for d in (dim // 2, dim // 4) if d)
    if wrong := [d for d in chosen if not 0 < d <= dim]:
        raise InputError(f"cheaper.dims has {wrong[0]}; the model gives {dim} dimensions")
    return [*configuration.cheaper.types, *(f"dim{d}" for d in chosen)]


def measure_similarity(
    name: str, data: Any, configuration: EvaluateConfiguration, systems: Mapping[str, TextModel]
) -> Iterator[Measured]:
    """How the cosines of pairs go with what people said."""
    texts = list(dict.fromkeys([*data.first, *data.second]))
    place = {text: i for i, text in enumerate(texts)}
    a, b = ([place[text] for text in side] for side in (data.first, data.second))
    cosines: dict[str, np.ndarray] = {}
    for system, model in systems.items():
        vectors = unit(model.documents(texts)[0])
        cosines[system] = (vectors[a] * vectors[b]).sum(axis=1)
    if "tf-idf" in configuration.lexical:
        cosines["tf-idf"] = tfidf_pairs(data.first, data.second)
    scores = np.array(data.scores)
    for system, values in cosines.items():
        for metric, ranked in (("spearman", True), ("pearson", False)):
            yield Measured(name, system, metric, len(scores), correlation_of(values, scores, ranked=ranked))


def correlation_of(first_N: np.ndarray, second_N: np.ndarray, *, ranked: bool) -> Statistic:
    """Pearson's correlation over items, or of their ranks (Spearman's); not a number where one side is constant."""
    rankdata = needed("scipy.stats").rankdata
    sides = [np.asarray(side, dtype=np.float64) for side in (first_N, second_N)]

    def correlation(picks: np.ndarray) -> np.ndarray:
        centred = []
        for side in sides:
            values = rankdata(side[picks], axis=1) if ranked else side[picks]
            centred.append(values - values.mean(axis=1, keepdims=True))
        lengths = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
        with np.errstate(invalid="ignore"):
            return (centred[0] * centred[1]).sum(axis=1) / np.where(lengths > 0, lengths, np.nan)

    return correlation


def measure_classification(
    name: str, data: Any, configuration: EvaluateConfiguration, systems: Mapping[str, TextModel]
) -> Iterator[Measured]:
    """Accuracy of a logistic regression on unit vectors, and of a linear SVM on tf-idf."""
    linear = needed("sklearn.linear_model")
    truth = np.array(data.test_labels)
    count = len(data.train_texts)
    predicted: dict[str, np.ndarray] = {}
    for system, model in systems.items():
        vectors = unit(model.documents([*data.train_texts, *data.test_texts])[0])
        probe = linear.LogisticRegression(C=configuration.classification[name].strength, max_iter=2_000)
        predicted[system] = probe.fit(vectors[:count], data.train_labels).predict(vectors[count:])
    if "tf-idf" in configuration.lexical:
        vectorizer = tfidf_vectorizer()
        svm = needed("sklearn.svm").LinearSVC(random_state=0)
        svm.fit(vectorizer.fit_transform(data.train_texts), data.train_labels)
        predicted["tf-idf"] = svm.predict(vectorizer.transform(data.test_texts))
    for system, labels in predicted.items():
        yield Measured(name, system, "accuracy", len(truth), mean_of(labels == truth))


MEASURE: dict[str, Callable[..., Iterator[Measured]]] = {
    "retrieval": measure_retrieval,
    "similarity": measure_similarity,
    "classification": measure_classification,
}


# For training loops


def evaluate(folder: str | os.PathLike[str], configuration: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate a folder from a program.

    Args:
        configuration: the settings as a TOML file has them, without `model`.

    Returns:
        Name -> value of every figure.

    Raises:
        InputError: as the command.
    """
    from jobs.configuration import load

    tree = {**configuration, "model": os.fspath(folder)}
    settings = load(EvaluateConfiguration, file=None, sets=[], given={}, defaults=tree)
    return {figure.name: figure.interval.value for figure in run_evaluate(settings).figures}


def validate(
    checkpoint: "ray.train.Checkpoint", configuration: Mapping[str, Any], subfolder: str = ""
) -> dict[str, float]:
    """`evaluate` as Ray Train's validation function, for checkpoints that hold a model folder:
    `ValidationConfig(fn=validate, task_config=ValidationTaskConfig(fn_kwargs={"configuration": {...}}))`.
    """
    with checkpoint.as_directory() as place:
        return evaluate(Path(place) / subfolder, {"keep": False, **configuration})
