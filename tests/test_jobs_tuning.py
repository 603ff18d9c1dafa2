"""Settings of a fine-tuning, and what follows from them without a weight."""

from pathlib import Path
from typing import Any

import pytest

from jobs.configuration import load
from jobs.tuning import (
    FinetuneConfiguration,
    ScheduleSettings,
    check_settings,
    count_steps,
    dims_of,
    phase_of,
    prompt_for,
    prompts_of,
)
from model.errors import InputError
from model.folder import read_folder

ROOT = Path(__file__).resolve().parent.parent
GIVEN: dict[str, Any] = {
    "output": "out",
    "model.start": "start",
    "data.pairs.path": "pairs.jsonl",
    "data.pairs.task": "contrastive",
}


def settings(*sets: str) -> FinetuneConfiguration:
    return load(FinetuneConfiguration, file=None, sets=sets, given=GIVEN)


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "configs").glob("finetune-*.toml")), ids=lambda f: f.stem)
def test_configurations_are_whole(file: Path) -> None:
    configuration = load(FinetuneConfiguration, file=str(file), sets=(), given={})
    check_settings(configuration, read_folder(ROOT / "models" / "nightloom-small"))


def test_the_whole_vector_is_always_among_the_dims() -> None:
    assert dims_of(settings(), 64) == ((64,), (1.0,))
    assert dims_of(settings("matryoshka.dims=[16]", "matryoshka.weights=[0.5]"), 64) == ((16, 64), (0.5, 1.0))
    assert dims_of(settings("matryoshka.dims=[64,16]", "matryoshka.weights=[2.0,1.0]"), 64) == ((64, 16), (2.0, 1.0))


def test_steps_follow_from_epochs() -> None:
    assert count_steps(ScheduleSettings(examples_per_step=10), 95) == 10
    assert count_steps(ScheduleSettings(examples_per_step=10, epochs=2.5), 100) == 25
    assert count_steps(ScheduleSettings(examples_per_step=10, steps=7), 100) == 7
    assert count_steps(ScheduleSettings(examples_per_step=64), 3) == 1


def test_the_rate_is_counted_in_steps(tiny_model_folder: Path) -> None:
    schedule = ScheduleSettings(learning_rate=1.0, warmup=0.2, decay=0.4)
    phase = phase_of(schedule, 10, read_folder(tiny_model_folder))
    rates = [phase.rate_at(step) for step in range(10)]
    assert rates[:7] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])
    assert rates[8] == pytest.approx(1 - 0.5**0.5)
    assert [phase.is_decaying(step) for step in (5, 6)] == [False, True]
    assert phase.num_steps == 10


def test_prompts_are_the_folders_unless_given(tiny_model_folder: Path) -> None:
    folder = read_folder(tiny_model_folder)
    assert prompts_of(settings(), folder) == {"query": "query: ", "document": ""}
    given = settings('model.prompts={question = "Q: "}')
    assert prompts_of(given, folder) == {"question": "Q: "}
    assert prompt_for({"question": "Q: "}, ("query", "question")) == "Q: "
    assert prompt_for({}, ("query",)) == ""


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"the nearest is 'contrastive\.temperature'"):
        settings("contrastive.temperatur=0.1")


def test_tasks_of_several_sources(tiny_model_folder: Path) -> None:
    folder = read_folder(tiny_model_folder)
    both = settings("data.vectors.path=x", "data.vectors.task=distillation")
    check_settings(both, folder)
    assert both.tasks == ("contrastive", "distillation")
    with pytest.raises(InputError, match="masked takes one source"):
        check_settings(settings("data.pairs.task=masked", "data.more.path=x", "data.more.task=masked"), folder)
