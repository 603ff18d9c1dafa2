"""The loop in one process: golden losses, a run cut at any step and resumed, spikes, NaNs, phases, averages, ordering.

Under Ray, with several workers and with kills, the same is in test_jobs_pretrain.py.
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.checkpoints import Checkpoints
from jobs.configuration import load
from jobs.monitor import LINES, read_lines
from jobs.phases import PretrainConfiguration, plan_phases, shape_of
from jobs.pretrain import check, go_on, run_pretrain
from jobs.replicas import Replicas
from jobs.training import Signals
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import read_folder
from model.heads import MaskedLanguageModel
from model.weights import load_model, save_folder
from pipeline.shards import TokenShards
from pipeline.stream import TokenStream

GOLDEN = Path(__file__).resolve().parent / "golden" / "pretrain.json"
TINY = {
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2},
    "work": {"dtype": "float32"},
    "keep": {"checkpoint_every": 5, "evaluate_every": 10, "evaluation_bins": 2},
    "phases": {
        "stable": {
            "tokens": 13_312,
            "max_tokens": 128,
            "tokens_per_bin": 512,
            "tokens_per_step": 1024,
            "first_tokens_per_step": 512,
            "batch_warmup_tokens": 2048,
            "learning_rate": 4e-3,
            "warmup_tokens": 4096,
            "global_theta": 10_000.0,
        },
        "extension": {
            "tokens": 6144,
            "max_tokens": 512,
            "tokens_per_bin": 512,
            "tokens_per_step": 1024,
            "learning_rate": 2e-3,
            "decay_tokens": 4096,
            "average_every": 2,
            "global_theta": 160_000.0,
        },
    },
}
"""Twenty steps: fourteen at 128 tokens with a growing batch, six at 512 with a falling rate."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """So small a model is fastest so, and sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configuration(tokens: Path, output: Path, *sets: str) -> PretrainConfiguration:
    given = {"tokens": str(tokens), "output": str(output)} | dict(flat(TINY))
    return load(PretrainConfiguration, file=None, sets=sets, given=given)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def pretrain(tokens: Path, output: Path, *sets: str, signals: Signals | None = None) -> dict[str, Any]:
    return go_on(configuration(tokens, output, *sets), Replicas(), signals or Signals())


@pytest.fixture(scope="module")
def whole_run(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    assert pretrain(text_shards, output)["status"] == "done"
    return output, read_lines(output / LINES)


def test_golden_losses(whole_run: tuple[Path, list[dict[str, Any]]]) -> None:
    """Bins and masks bit for bit, losses to 1e-4. After an intended change: delete the file, run the test, look at the
    difference, commit it.
    """
    lines = whole_run[1]
    found = [{"digest": item["digest"], "loss": round(item["loss"], 6)} for item in lines]
    assert len(found) == 20
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert [item["digest"] for item in found] == [item["digest"] for item in golden]
    assert [item["loss"] for item in found] == pytest.approx([item["loss"] for item in golden], abs=1e-4)


def test_it_learns_and_says_so(whole_run: tuple[Path, list[dict[str, Any]]]) -> None:
    output, lines = whole_run
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert [item["step"] for item in lines if "heldout_loss" in item] == [10, 14, 20]
    assert [item["phase"] for item in lines] == ["stable"] * 14 + ["extension"] * 6
    assert [item["bins"] for item in lines[:5]] == [1, 1, 2, 2, 2], "the batch grows"
    assert all(0 <= item["padding"] < 0.5 and item["masked"] > 0 and item["mfu"] > 0 for item in lines)
    assert [item["learning_rate"] for item in lines[14:16]] == [2e-3, 2e-3]
    assert lines[-1]["learning_rate"] < 0.5 * 2e-3
    assert (output / "loss.svg").stat().st_size > 1000


def test_the_model_that_comes_out_has_the_last_phases_positions(whole_run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = read_folder(whole_run[0] / "model")
    assert (folder.config.max_tokens, folder.config.global_theta) == (512, 160_000.0)
    model = load_model(folder)
    assert isinstance(model, MaskedLanguageModel)
    assert (whole_run[0] / "model" / "tokenizer.json").is_file()


class StopAt(Signals):
    """The wish to stop after so many steps, as SIGTERM brings it."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def look(self) -> str | None:
        return "stop"


@pytest.mark.parametrize("cut", [3, 14, 17])
def test_a_run_cut_and_resumed_is_the_run(
    cut: int, text_shards: Path, tmp_path: Path, whole_run: tuple[Path, list[dict[str, Any]]]
) -> None:
    """In the middle of a phase, at its end, and where an average has begun; bit for bit, weights included."""
    output = tmp_path / "run"
    assert pretrain(text_shards, output, signals=StopAt(cut))["status"] == "stopped"
    assert Checkpoints(str(output)).steps()[-1] == cut
    assert pretrain(text_shards, output)["status"] == "done"
    lines = read_lines(output / LINES)
    for mine, theirs in zip(lines, whole_run[1], strict=True):
        for key in ("step", "loss", "digest", "gradient_norm", "learning_rate", "tokens", "phase"):
            assert mine[key] == theirs[key], (mine["step"], key)
    first, second = (Path(folder) / "model" / "model.safetensors" for folder in (output, whole_run[0]))
    assert first.read_bytes() == second.read_bytes()


def test_steps_after_the_last_checkpoint_are_taken_again(
    text_shards: Path, tmp_path: Path, whole_run: tuple[Path, list[dict[str, Any]]]
) -> None:
    """As after `kill -9`: lines that lie after the checkpoint are dropped, and come again the same."""

    class Killed(Signals):
        def look(self) -> str | None:
            raise SystemExit

        def due(self) -> bool:
            self.steps = getattr(self, "steps", 0) + 1
            return self.steps == 8

    output = tmp_path / "run"
    with pytest.raises(SystemExit):
        pretrain(text_shards, output, signals=Killed())
    assert Checkpoints(str(output)).steps() == [5]
    assert [item["step"] for item in read_lines(output / LINES)] == [1, 2, 3, 4, 5, 6, 7]
    pretrain(text_shards, output, "stop_after=9")
    lines = read_lines(output / LINES)
    assert [(i["step"], i["digest"], i["loss"]) for i in lines] == [
        (i["step"], i["digest"], i["loss"]) for i in whole_run[1][:9]
    ]


def test_a_phase_that_is_cut_short_where_it_stands_gives_way_to_the_next(text_shards: Path, tmp_path: Path) -> None:
    """Five steps of one and two bins are 4,096 tokens."""
    pretrain(text_shards, tmp_path / "run", "stop_after=5")
    assert pretrain(text_shards, tmp_path / "run", "phases.stable.tokens=4096", "stop_after=7")["status"] == "stopped"
    assert [item["phase"] for item in read_lines(tmp_path / "run" / LINES)] == ["stable"] * 5 + ["extension"] * 2


def test_a_limit_that_is_reached_holds(text_shards: Path, tmp_path: Path) -> None:
    """The same command takes no step more; a higher limit goes on, and a lower one is reached too."""
    reached = []
    for limit in (3, 3, 5, 4):
        result = pretrain(text_shards, tmp_path / "run", f"stop_after={limit}")
        reached.append((result["status"], result["step"]))
    assert reached == [("stopped", 3), ("stopped", 3), ("stopped", 5), ("stopped", 5)]
    assert Checkpoints(str(tmp_path / "run")).steps() == [3, 5]


@pytest.mark.parametrize("cut", [None, 6])
def test_an_average_is_of_the_last_phase(cut: int | None, text_shards: Path, tmp_path: Path) -> None:
    """The first phase falls to almost nothing and is averaged. The second, which is not, ruins the weights at an absurd
    rate: they are what was trained last, and are written all the same. Six steps are the first phase.
    """
    first = {"tokens": 5120, "decay_tokens": 5120, "average_every": 1, "warmup_tokens": 0}
    second = {"tokens": 3072, "decay_tokens": 0, "average_every": 0, "learning_rate": 0.5}
    sets = [f"phases.{name}.{key}={value}" for name, some in (("stable", first), ("extension", second))
            for key, value in some.items()]  # fmt: skip
    if cut:
        pretrain(text_shards, tmp_path / "run", *sets, f"stop_after={cut}")
    assert pretrain(text_shards, tmp_path / "run", *sets)["status"] == "done"
    assert [item["phase"] for item in read_lines(tmp_path / "run" / LINES)] == ["stable"] * 6 + ["extension"] * 3
    checkpoints = Checkpoints(str(tmp_path / "run"))
    last = checkpoints.load(checkpoints.steps()[-1])
    assert last.record["averaged"] == 0
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")["model.final_norm.weight"]
    assert torch.equal(written, last.tensors["weights.language_model.model.final_norm.weight"])


def test_a_run_that_is_done_stays_done(text_shards: Path, whole_run: tuple[Path, list[dict[str, Any]]]) -> None:
    before = (whole_run[0] / "model" / "model.safetensors").read_bytes()
    result = pretrain(text_shards, whole_run[0])
    assert (result["status"], result["step"]) == ("done", 20)
    assert (whole_run[0] / "model" / "model.safetensors").read_bytes() == before
    assert len(read_lines(whole_run[0] / LINES)) == 20
    report = run_pretrain(configuration(text_shards, whole_run[0]))
    assert (report.status, report.steps) == ("unchanged", 20)


@pytest.fixture(scope="module")
def untied_model(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model whose embedding of one token is no number, and the bin that token comes in first."""
    settings = configuration(text_shards, tmp_path_factory.mktemp("untied") / "run")
    shards = TokenShards.open(str(text_shards))
    with closing(TokenStream(shards, plan_phases(settings)[0].stream).steps()) as steps:
        bins = [item for _ in range(6) for item in next(steps).bins]
    counts = np.bincount(np.concatenate([np.unique(item.tokens_T) for item in bins]))
    where = next(i for i in range(5, len(bins)) if (counts[bins[i].tokens_T] == 1).any())
    token = next(t for t in bins[where].tokens_T.tolist() if counts[t] == 1)
    shape = replace(shape_of(settings.model, shards.manifest), tie_word_embeddings=False, max_tokens=128)
    model = MaskedLanguageModel(Encoder(shape))
    init_weights(model, shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embeddings.tok_embeddings.weight[token] = math.nan
    folder = save_folder(model, tmp_path_factory.mktemp("models") / "nan", tokenizer_from=text_shards / "tokenizer")
    return folder, bins[where].name


def test_a_nan_stops_the_run_and_names_its_bin(
    text_shards: Path, tmp_path: Path, untied_model: tuple[Path, str]
) -> None:
    folder, name = untied_model
    result = pretrain(text_shards, tmp_path / "run", f"model.start={json.dumps(str(folder))}")
    assert result["status"] == "diverged"
    assert f"because of {name};" in result["message"]
    assert "phase 'stable'" in result["message"]
    assert len(read_lines(tmp_path / "run" / LINES)) == result["step"] > 0


def test_skipped_steps_are_the_same_ones_again(text_shards: Path, tmp_path: Path) -> None:
    """A second phase whose rate is absurd: its first step ruins the weights, and the guard skips what follows."""
    wild = {"stable.tokens_per_step": 512, "stable.tokens": 21 * 512, "extension.tokens_per_step": 512}
    wild |= {"extension.tokens": 6 * 512, "extension.decay_tokens": 0, "extension.learning_rate": 0.5}
    sets = [f"phases.{key}={value}" for key, value in wild.items()]
    pretrain(text_shards, tmp_path / "cut", *sets, signals=StopAt(24))
    for name in ("whole", "cut"):
        pretrain(text_shards, tmp_path / name, *sets)
    whole, cut = ([(i["skipped"], i["loss"]) for i in read_lines(tmp_path / n / LINES)] for n in ("whole", "cut"))
    assert whole == cut
    assert [skipped for skipped, _ in whole] == [False] * 22 + [True] * 5
    assert Checkpoints(str(tmp_path / "whole")).read_record(27)["optimizer_steps"] == 22


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.05)])
def test_mixed_precision_learns_alike(
    dtype: str, tolerance: float, text_shards: Path, tmp_path: Path, whole_run: tuple[Path, list[dict[str, Any]]]
) -> None:
    pretrain(text_shards, tmp_path / "run", f"work.dtype={dtype}", "stop_after=6")
    lines = read_lines(tmp_path / "run" / LINES)
    taken = [item for item in lines if not item["skipped"]]
    assert len(taken) >= 5
    assert lines[0]["loss"] == pytest.approx(whole_run[1][0]["loss"], abs=tolerance)
    assert taken[-1]["loss"] < lines[0]["loss"]
    assert ("loss_scale" in lines[0]) == (dtype == "float16")


def test_recomputed_activations_change_nothing(
    text_shards: Path, tmp_path: Path, whole_run: tuple[Path, list[dict[str, Any]]]
) -> None:
    pretrain(text_shards, tmp_path / "run", "work.checkpoint_activations=true", "stop_after=3")
    losses = [item["loss"] for item in read_lines(tmp_path / "run" / LINES)]
    assert losses == [item["loss"] for item in whole_run[1][:3]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler's own doing
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.02)])
def test_compiled_layers_learn_the_same(
    dtype: str, tolerance: float, text_shards: Path, tmp_path: Path, whole_run: tuple[Path, list[dict[str, Any]]]
) -> None:
    pretrain(text_shards, tmp_path / "run", "work.compile=true", f"work.dtype={dtype}", "stop_after=3")
    losses = [item["loss"] for item in read_lines(tmp_path / "run" / LINES)]
    assert losses == pytest.approx([item["loss"] for item in whole_run[1][:3]], abs=tolerance)


def test_sentence_ordering_is_trained_beside(text_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    pretrain(text_shards, output, "objective.ordering_weight=0.5", "stop_after=3")
    lines = read_lines(output / LINES)
    losses = [item["ordering_loss"] for item in lines]
    assert 0.5 < losses[0] < 0.9  # ln 2 is a guess; what follows is a handful of pairs at a high learning rate
    assert all(0.2 < loss < 2.5 for loss in losses), losses
    with pytest.raises(InputError, match="began with sentence ordering True, not False"):
        check(configuration(text_shards, output))


def test_memory_does_not_grow_with_steps(text_shards: Path, tmp_path: Path) -> None:
    """Resident size after 8 steps and after 40."""
    sizes = []

    class Watching(Signals):
        def due(self) -> bool:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)
            return False

    pretrain(text_shards, tmp_path / "run", "phases.stable.tokens=45056", "stop_after=40", signals=Watching())
    assert max(sizes[30:]) < max(sizes[4:12]) + 40
