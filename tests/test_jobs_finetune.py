"""Fine-tuning, task by task, in one process: what is written loads elsewhere with the same output, a run that is cut
goes on as if nothing had happened, and what cannot be trained is one line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.cli import main
from jobs.configuration import load
from jobs.finetune import check, go_on, rotate
from jobs.monitor import LINES, read_lines
from jobs.replicas import Replicas
from jobs.training import Signals
from jobs.tuning import FinetuneConfiguration
from model import Embedder
from model.batch import pack
from model.dense import Dense, load_dense
from model.errors import InputError
from model.folder import load_tokenizer, read_folder
from model.heads import SequenceClassifier, TokenClassifier
from model.weights import load_encoder, load_model, save_folder

SUBJECTS = ["fox", "dog", "night", "crash", "vector", "window", "token", "cluster"]
WORDS = ["lazy", "quick", "long", "every", "each", "three", "sixty", "small"]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is fastest so, and sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(count: int, seed: int = 0) -> list[tuple[int, str]]:
    """(subject, text): a few words about one of the subjects."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        subject = int(rng.integers(len(SUBJECTS)))
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 9))]
        words.insert(int(rng.integers(len(words) + 1)), SUBJECTS[subject])
        found.append((subject, " ".join(words)))
    return found


def write_rows(folder: Path, task: str, count: int = 160) -> Path:
    rows: list[dict[str, Any]] = []
    others = sentences(count, seed=1)
    directions = np.random.default_rng(2).normal(size=(len(SUBJECTS), 64))
    for (subject, text), (other, another) in zip(sentences(count), others, strict=True):
        if task == "contrastive":
            query = f"{SUBJECTS[subject]} {WORDS[len(rows) % 8]}?"
            wrong = {"negatives": [another]} if other != subject and len(rows) % 3 == 0 else {}
            rows.append({"query": query, "positive": text, "positive_id": str(subject), **wrong})
        elif task == "distillation":
            rows.append({"text": text, "vector": (directions[subject] / 8).tolist()})
        elif task == "classification":
            rows.append({"text": text, "label": f"about {SUBJECTS[subject]}"})
        elif task == "regression":
            rows.append({"text": text, "label": subject / 4})
        elif task == "tagging":
            words = text.split()
            rows.append({"tokens": words, "tags": ["THING" if word in SUBJECTS else "O" for word in words]})
        else:
            rows.append({"text": text})
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def configuration(model: Path, output: Path, data: dict[str, Path], *sets: str) -> FinetuneConfiguration:
    given: dict[str, Any] = {
        "model.start": str(model),
        "output": str(output),
        "work.dtype": "float32",
        "keep.checkpoint_every": 4,
        "keep.evaluate_every": 0,
        "schedule.examples_per_step": 16,
        "schedule.tokens_per_bin": 512,
        "schedule.steps": 12,
        "schedule.learning_rate": 2e-3,
    }
    for name, file in data.items():
        given |= {f"data.{name}.path": str(file), f"data.{name}.task": name}
    return load(FinetuneConfiguration, file=None, sets=sets, given=given)


def train(settings: FinetuneConfiguration) -> list[dict[str, Any]]:
    """To the end, in this process; the lines."""
    assert go_on(settings, check(settings)[1], Replicas(), Signals())["status"] == "done"
    return read_lines(Path(settings.output) / LINES)


def mean(lines: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


def test_pairs_bring_answers_nearer(tiny_model_folder: Path, tmp_path: Path) -> None:
    """And the folder gives the same vectors in sentence-transformers, prompts and all."""
    from sentence_transformers import SentenceTransformer

    rows = write_rows(tmp_path, "contrastive", 240)
    sets = ("schedule.steps=40", "heldout=0.1", "matryoshka.dims=[16,32]", "contrastive.learn_temperature=true")
    settings = configuration(tiny_model_folder, tmp_path / "run", {"contrastive": rows}, *sets)
    lines = train(settings)
    assert mean(lines[-5:], "loss") < mean(lines[:5], "loss") - 0.3
    assert mean(lines[-5:], "accuracy") > mean(lines[:5], "accuracy") + 0.2
    assert 0 < lines[-1]["heldout_loss"] < 3
    folder = tmp_path / "run" / "model"
    texts = [text for _, text in sentences(12, seed=3)]
    ours = Embedder(folder, dtype="float32").encode(texts, prompt_name="query")
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, prompt_name="query")
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert read_folder(folder).prompts == {"query": "query: ", "document": ""}
    before = Embedder(tiny_model_folder, dtype="float32").encode(texts, prompt_name="query")
    assert np.abs(ours - before).max() > 0.01


@pytest.mark.parametrize("task", ["contrastive", "distillation"])
def test_dense_modules_are_trained_and_written(task: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    said = read_folder(tiny_model_folder)
    options = said.sentence_options() | {"dense": [Dense(64, 24)]}
    start = save_folder(load_encoder(said), tmp_path / "start", tokenizer_from=tiny_model_folder, **options)
    rows = write_rows(tmp_path, task, 60)
    sets = ("schedule.steps=3", "schedule.grad_cache=true", "distillation.rotate=true")
    train(configuration(start, tmp_path / "run", {task: rows}, *sets))
    before, after = (load_dense(read_folder(folder).dense)[0].linear for folder in (start, tmp_path / "run" / "model"))
    assert not torch.equal(before.weight, after.weight)
    texts = [text for _, text in sentences(12, seed=3)]
    theirs = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu").encode(texts)
    ours = Embedder(tmp_path / "run" / "model", dtype="float32").encode(texts)
    assert ours.shape == (12, 24)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_a_teacher_is_followed(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "distillation", 240)
    sets = ("schedule.steps=40", "distillation.neighbour_weight=0.25", "distillation.joined_share=0.5",
            "distillation.joined_tokens=60", "model.pooling=mean")  # fmt: skip
    lines = train(configuration(tiny_model_folder, tmp_path / "run", {"distillation": rows}, *sets))
    assert mean(lines[-5:], "cosine") > mean(lines[:5], "cosine") + 0.3
    assert lines[0]["source"] == "distillation"


def test_a_wide_teacher_is_rotated() -> None:
    """What its vectors span is kept, and with it their dot products."""
    rng = np.random.default_rng(0)
    teacher = (rng.normal(size=(50, 6)) @ rng.normal(size=(6, 40))).astype(np.float32)
    cut = rotate(teacher, 8)
    assert cut.shape == (50, 8)
    np.testing.assert_allclose(cut @ cut.T, teacher @ teacher.T, rtol=1e-3, atol=1e-2)
    energy = np.square(cut).sum(axis=0)
    assert (np.diff(energy) <= 1e-3).all(), "the first dimension holds most"


def test_pairs_and_a_teacher_by_turns(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = {task: write_rows(tmp_path, task) for task in ("contrastive", "distillation")}
    lines = train(configuration(tiny_model_folder, tmp_path / "run", data, "heldout=0.2"))
    kinds = [line["source"] for line in lines]
    assert set(kinds) == {"contrastive", "distillation"}
    assert all(("accuracy" in line) == (line["source"] == "contrastive") for line in lines[:-1])
    assert {"heldout_loss", "heldout_accuracy", "heldout_cosine_distillation"} <= set(lines[-1])


def test_a_source_is_no_spike_of_another(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Its loss lies far above that of the source which most steps are of."""
    texts = [text for _, text in sentences(200)]
    vectors = Embedder(tiny_model_folder, dtype="float32").encode(texts)
    near = tmp_path / "near.jsonl"
    rows = [{"text": text, "vector": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]
    near.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"distillation": near, "contrastive": write_rows(tmp_path, "contrastive", 40)}
    sets = ("data.distillation.share=9", "data.contrastive.share=1", "schedule.steps=40", "seed=1")
    lines = train(configuration(tiny_model_folder, tmp_path / "run", data, *sets))
    rare = [number for number, line in enumerate(lines) if line["source"] == "contrastive"]
    assert rare == [25, 27, 31, 35], "when the guard has seen enough of the other to judge"
    assert not any(line["skipped"] for line in lines)


def test_a_batch_without_a_negative_teaches_nothing(tiny_model_folder: Path, tmp_path: Path) -> None:
    """All positives are one document: the loss and the whole gradient are 0."""
    rows = [
        {"query": f"{word}?", "positive": text, "positive_id": "faq"}
        for word, (_, text) in zip(WORDS * 2, sentences(16), strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"contrastive": tmp_path / "rows.jsonl"}
    lines = train(configuration(tiny_model_folder, tmp_path / "run", data, "schedule.steps=2"))
    assert [(line["loss"], line["gradient_norm"]) for line in lines] == [(0, 0)] * 2


def test_labels_are_learned(tiny_masked_folder: Path, tmp_path: Path) -> None:
    """And transformers gives the same logits, under the names of the labels."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = write_rows(tmp_path, "classification", 240)
    sets = ("schedule.steps=40", "heldout=0.1", "model.pooling=mean")
    lines = train(configuration(tiny_masked_folder, tmp_path / "run", {"classification": rows}, *sets))
    assert mean(lines[-5:], "accuracy") > 0.7 > mean(lines[:5], "accuracy")
    assert lines[-1]["heldout_accuracy"] > 0.5
    folder = tmp_path / "run" / "model"
    texts = [text for _, text in sentences(9, seed=3)]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**batch).logits
        model = load_model(read_folder(folder))
        assert isinstance(model, SequenceClassifier)
        ours = model(pack([e.ids for e in load_tokenizer(folder).encode_batch(texts)]))
    torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert theirs.config.id2label[0] == "about cluster"
    assert theirs.config.problem_type == "single_label_classification"


def test_a_trained_classifier_goes_on_with_its_labels(tiny_masked_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "classification", 120)
    first = configuration(tiny_masked_folder, tmp_path / "first", {"classification": rows}, "schedule.steps=4")
    train(first)
    start = tmp_path / "first" / "model"
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": "a fox", "label": "about fox"}) + "\n", encoding="utf-8")
    second = configuration(start, tmp_path / "second", {"classification": few}, "schedule.steps=2")
    train(second)
    assert read_folder(tmp_path / "second" / "model").config.num_labels == 8


def test_numbers_are_learned(tiny_masked_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = write_rows(tmp_path, "regression", 240)
    lines = train(configuration(tiny_masked_folder, tmp_path / "run", {"regression": rows}, "schedule.steps=40"))
    assert mean(lines[-5:], "loss") < mean(lines[:5], "loss") / 2
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert (theirs.config.num_labels, theirs.config.problem_type) == (1, "regression")


def test_tags_are_learned(tiny_masked_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    rows = write_rows(tmp_path, "tagging")
    lines = train(
        configuration(tiny_masked_folder, tmp_path / "run", {"tagging": rows}, "schedule.steps=30", "heldout=0.1")
    )
    assert lines[-1]["heldout_accuracy"] > 0.95
    folder = tmp_path / "run" / "model"
    ids = load_tokenizer(folder).encode("quick fox every night").ids
    with torch.no_grad():
        theirs = AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager")
        logits = theirs(input_ids=torch.tensor([ids])).logits[0]
        model = load_model(read_folder(folder))
        assert isinstance(model, TokenClassifier)
        torch.testing.assert_close(model(pack([ids])), logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert theirs.config.id2label == {0: "O", 1: "THING"}


def test_masked_tokens_go_on(tiny_masked_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "masked", 240)
    lines = train(
        configuration(tiny_masked_folder, tmp_path / "run", {"masked": rows}, "schedule.steps=40", "heldout=0.1")
    )
    assert mean(lines[-5:], "loss") < mean(lines[:5], "loss") - 1
    assert read_folder(tmp_path / "run" / "model").architecture == "ModernBertForMaskedLM"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("task", ["contrastive", "masked"])
def test_a_cut_run_is_the_run(task: str, tiny_masked_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, task)
    whole = configuration(
        tiny_masked_folder, tmp_path / "whole", {task: rows}, "schedule.average_every=2", "heldout=0.1"
    )
    lines = train(whole)
    cut = whole.model_copy(update={"output": str(tmp_path / "cut")})
    for stop in (3, 7):
        stopped = go_on(cut.model_copy(update={"stop_after": stop}), check(cut)[1], Replicas(), Signals())
        assert (stopped["status"], stopped["step"]) == ("stopped", stop)
    train(cut)
    others = read_lines(tmp_path / "cut" / LINES)
    for key in ("step", "loss", "gradient_norm", "digest", "learning_rate"):
        assert [line[key] for line in others] == [line[key] for line in lines]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name


def test_what_is_frozen_stays_and_lower_layers_move_less(tiny_masked_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "classification")
    sets = ("model.freeze_layers=1", "model.layer_decay=0.1", "schedule.steps=4", "schedule.weight_decay=0.0")
    train(configuration(tiny_masked_folder, tmp_path / "run", {"classification": rows}, *sets))
    before = dict(load_model(read_folder(tiny_masked_folder)).named_parameters())
    after = weights(tmp_path / "run")

    def moved(name: str) -> float:
        return float((before[name].detach() - after[name]).abs().mean())

    assert moved("model.embeddings.tok_embeddings.weight") == 0
    assert moved("model.layers.0.mlp.Wi.weight") == 0
    second, third = (moved(f"model.layers.{i}.mlp.Wi.weight") for i in (2, 3))
    assert 0 < second < third / 5
    assert third < moved("head.dense.weight") / 5


@pytest.mark.parametrize(
    "task, sets, message",
    [
        ("contrastive", ["schedule.tokens_per_bin=8"], "tokens_per_bin is 8, and a sequence has"),
        ("contrastive", ["matryoshka.dims=[65]"], "matryoshka.dims has 65; the model's vectors have 64 dimensions"),
        ("contrastive", ["matryoshka.dims=[8]", "matryoshka.weights=[1.0,2.0]"], "1 dims have 2 weights"),
        ("contrastive", ["model.freeze_layers=9"], "model.freeze_layers is 9; the model has 4 layers"),
        ("contrastive", ["schedule.epochs=1.0"], "both given; take one away"),
        ("contrastive", ["work.strategy=fsdp"], "use ddp"),
        ("contrastive", ["data.contrastive.path=nowhere"], "data.contrastive: the source nowhere does not exist"),
        ("contrastive", ["model.start=nowhere/at/all"], "no model folder at"),
        ("classification", ['model.labels=["about fox", "about dog"]'], "the label 'about .*' is none of the model's"),
        ("classification", ["model.pooling=last"], "a classifier of sequences takes mean or cls"),
        ("distillation", ["distillation.distance_weight=0.0"], "nothing would be learned"),
    ],
)
def test_what_is_wrong_is_one_line(
    task: str, sets: list[str], message: str, tiny_masked_folder: Path, tmp_path: Path
) -> None:
    settings = configuration(tiny_masked_folder, tmp_path / "run", {task: write_rows(tmp_path, task, 24)}, *sets)
    with pytest.raises(InputError, match=message) as raised:
        check(settings)
    assert "\n" not in str(raised.value)


def test_a_teacher_of_another_dimension(tiny_masked_folder: Path, tmp_path: Path) -> None:
    for dim, message in (
        (80, "80 dimensions, .* 64; distillation.rotate cuts"),
        (8, "take a narrower model"),
    ):
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(20 * dim, np.float32)), dim)
        pq.write_table(pa.table({"text": [f"fox {i}" for i in range(20)], "vector": column}), tmp_path / "rows.parquet")
        settings = configuration(tiny_masked_folder, tmp_path / "run", {"distillation": tmp_path / "rows.parquet"})
        with pytest.raises(InputError, match=message):
            check(settings)


def test_tasks_with_heads_stand_alone(tiny_masked_folder: Path, tmp_path: Path) -> None:
    data = {task: write_rows(tmp_path, task, 24) for task in ("contrastive", "classification")}
    with pytest.raises(InputError, match="contrastive and classification cannot be trained together"):
        check(configuration(tiny_masked_folder, tmp_path / "run", data))


def test_a_bare_encoder_has_no_masked_tokens(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no masked-token head"):
        check(configuration(tiny_model_folder, tmp_path / "run", {"masked": write_rows(tmp_path, "masked", 24)}))


def test_another_temperature_or_other_examples_under_a_resumed_run(
    tiny_masked_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command: one line, status 2."""
    rows = write_rows(tmp_path, "contrastive", 40)
    settings = configuration(tiny_masked_folder, tmp_path / "run", {"contrastive": rows}, "stop_after=1")
    assert go_on(settings, check(settings)[1], Replicas(), Signals())["status"] == "stopped"
    with pytest.raises(InputError, match=r"began with contrastive\.learn_temperature False, not True"):
        check(
            configuration(
                tiny_masked_folder, tmp_path / "run", {"contrastive": rows}, "contrastive.learn_temperature=true"
            )
        )
    write_rows(tmp_path, "contrastive", 41)
    file = tmp_path / "run.toml"
    file.write_text(f'output = "{settings.output}"\n[model]\nstart = "{tiny_masked_folder}"\n'
                    f'[data.contrastive]\npath = "{rows}"\ntask = "contrastive"\n')  # fmt: skip
    assert main(["finetune", str(file), "--set", "schedule.steps=12", "--set", "schedule.examples_per_step=16"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the run began with examples" in line
