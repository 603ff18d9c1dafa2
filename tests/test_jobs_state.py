"""A state taken down and brought back, what may change between two runs of one output, and where weights begin."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from jobs import state as state_module
from jobs.objective import facts_of
from jobs.phases import PretrainConfiguration, plan_phases, shape_of
from jobs.replicas import Replicas
from jobs.state import (
    begin,
    bring_back,
    check_resumable,
    checkpoint_bytes,
    has_model,
    save_model,
    starting_shape,
    take_down,
    write_model,
)
from model.errors import InputError
from model.folder import read_folder
from pipeline.shards import Manifest, TokenShards
from pipeline.stream import StreamState

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2}
PHASES = {"first": {"tokens": 10**6, "max_tokens": 128}, "second": {"tokens": 10**6, "max_tokens": 512}}


@pytest.fixture(scope="module")
def manifest(text_shards: Path) -> Manifest:
    return TokenShards.open(str(text_shards)).manifest


def configuration(**changes: Any) -> PretrainConfiguration:
    values = {"tokens": "t", "output": "o", "model": SMALL, "phases": PHASES, "work": {"dtype": "float32"}}
    return PretrainConfiguration.model_validate(values | changes)


def moved(state: Any) -> Any:
    """A state with something in every part of it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in state.model.parameters():
            for part in (parameter, *state.optimizer.moments(parameter)):
                part.add_(torch.rand(part.shape, generator=generator))
    state.take_into_average()
    state.phase, state.step, state.tokens, state.stream = 1, 12, 999, StreamState(3, 0, 1, 2, 24)
    state.optimizer.steps = 11
    state.scale.value, state.scale.good_steps = 512.0, 7
    for value in (5.0, 4.0):
        state.guard_of("").accepts(value, 1.0)
        state.guard_of("rare").accepts(2 * value, 3.0)
    state.guard_of("rare").skipped = 1
    return state


def test_what_is_taken_down_comes_back(manifest: Manifest) -> None:
    made = configuration(work={"dtype": "float16"})
    phases = plan_phases(made)
    state = moved(begin(made, manifest, Replicas()))
    checkpoint = take_down(state, made, phases, facts_of(made.objective), first=True)
    assert checkpoint is not None
    checkpoint = dataclasses.replace(checkpoint, record=json.loads(json.dumps(checkpoint.record)))
    other = begin(made, manifest, Replicas())
    bring_back(other, checkpoint)
    for name in ("phase", "step", "tokens", "stream", "averaged", "scale", "guards"):
        assert getattr(other, name) == getattr(state, name), name
    assert other.optimizer.steps == 11
    theirs = dict(state.model.named_parameters())
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert torch.equal(other.average[name], state.average[name])
        for mine, its in zip(other.optimizer.moments(parameter), state.optimizer.moments(theirs[name]), strict=True):
            assert torch.equal(mine, its)


def test_a_checkpoint_of_one_guard_for_all_still_comes_back(manifest: Manifest) -> None:
    made = configuration()
    state = moved(begin(made, manifest, Replicas()))
    checkpoint = take_down(state, made, plan_phases(made), facts_of(made.objective), first=True)
    assert checkpoint is not None
    record = dict(checkpoint.record)
    record["guard"] = record.pop("guards")[""]
    other = begin(made, manifest, Replicas())
    bring_back(other, dataclasses.replace(checkpoint, record=record))
    assert other.guards == {"": state.guards[""]}


@pytest.mark.parametrize(
    "before, now, scale, value",
    [
        ("float32", "float16", {"value": 1.0, "active": False}, 65536.0),
        ("float32", "float16", {"value": 1.0}, 65536.0),  # as checkpoints were
        ("float16", "float16", {"value": 1024.0}, 1024.0),
        ("float16", "float16", {"value": 1.0, "active": True}, 1.0),
        ("float16", "float32", {"value": 1024.0, "active": True}, 1.0),
        ("float16", "float32", {"value": 1024.0}, 1.0),
    ],
)
def test_a_loss_scale_is_that_of_the_type(
    before: str, now: str, scale: dict[str, Any], value: float, manifest: Manifest
) -> None:
    old, new = (configuration(work={"dtype": dtype}) for dtype in (before, now))
    checkpoint = take_down(begin(old, manifest, Replicas()), old, plan_phases(old), {}, first=True)
    assert checkpoint is not None
    record = {**checkpoint.record, "scale": {"good_steps": 7, "interval": 2000, **scale}}
    state = begin(new, manifest, Replicas())
    bring_back(state, dataclasses.replace(checkpoint, record=record))
    assert (state.scale.value, state.scale.active) == (value, now == "float16")


def test_an_average_is_the_mean_and_can_be_swapped_in(manifest: Manifest) -> None:
    state = begin(configuration(), manifest, Replicas())
    name, parameter = next(iter(state.model.named_parameters()))
    values = []
    for size in (1.0, 5.0, 3.0):
        with torch.no_grad():
            parameter.fill_(size)
        state.take_into_average()
        values.append(size)
    torch.testing.assert_close(state.average[name], torch.full_like(parameter, 3.0))
    with torch.no_grad():
        parameter.fill_(9.0)
    state.swap_average()
    assert parameter.mean().item() == pytest.approx(3.0)
    assert state.average[name].mean().item() == pytest.approx(9.0)


def test_entering_a_phase_sets_length_theta_and_decay(manifest: Manifest) -> None:
    phases = {"a": {"tokens": 10**6, "global_theta": 5000.0}, "b": {"tokens": 10**6, "max_tokens": 4096}}
    made = configuration(phases=phases | {"c": {"tokens": 10**6, "weight_decay": 0.5}})
    state = begin(made, manifest, Replicas())
    encoder = state.model.language_model.model
    seen = []
    for phase in plan_phases(made):
        state.enter(phase)
        groups = state.optimizer.param_groups
        seen.append((encoder.config.max_tokens, encoder.global_rotary.theta, groups[0]["weight_decay"]))
        assert groups[1]["weight_decay"] == 0.0
    assert seen == [(1024, 5000.0, 1e-5), (4096, 5000.0, 1e-5), (1024, 5000.0, 0.5)]


def record_of(made: PretrainConfiguration, manifest: Manifest) -> dict[str, Any]:
    state = moved(begin(made, manifest, Replicas()))
    checkpoint = take_down(state, made, plan_phases(made), facts_of(made.objective), first=True)
    assert checkpoint is not None
    return json.loads(json.dumps(checkpoint.record))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": SMALL | {"num_layers": 4}}, "another architecture: num_layers is 3, not 4"),
        ({"model": SMALL | {"hidden_size": 64}}, "another architecture: hidden_size is 32, not 64"),
        ({"objective": {"ordering_weight": 0.1}}, "began with sentence ordering False, not True"),
        ({"seed": 5}, "began with seed 0, not 5"),
        ({"phases": {"first": PHASES["first"]}}, "stands in phase 'second', which cannot be reached"),
        ({"phases": {"other": PHASES["first"], "second": PHASES["second"]}}, "phase 0 .* is not 'first'"),
        ({"phases": PHASES | {"first": {"tokens": 2 * 10**6, "max_tokens": 128}}}, "'first' was trained with tokens"),
        ({"phases": PHASES | {"second": {"tokens": 10**6, "max_tokens": 256}}}, "trained with max_tokens 512, not 256"),
        ({"phases": PHASES | {"second": {"tokens": 2 * 131_072, "max_tokens": 512}}}, "stands at step 3 .* ends at 2"),
    ],
)
def test_what_does_not_belong_together_is_one_line(changes: dict[str, Any], message: str, manifest: Manifest) -> None:
    record, made = record_of(configuration(), manifest), configuration(**changes)
    with pytest.raises(InputError, match=message):
        check_resumable(record, shape_of(made.model, manifest), made, plan_phases(made), facts_of(made.objective))


def test_the_rest_of_a_run_may_change(manifest: Manifest) -> None:
    """The end of the phase in progress, phases after it, and everything that does not decide what is learned."""
    record = record_of(configuration(), manifest)
    phases = PHASES | {"second": {"tokens": 3 * 10**6, "max_tokens": 512}, "third": {"tokens": 10**6}}
    made = configuration(phases=phases, work={"workers": 2}, keep={"checkpoint_every": 7})
    check_resumable(record, shape_of(made.model, manifest), made, plan_phases(made), facts_of(made.objective))


def test_a_run_can_start_from_a_folder_and_grow_out_of_one(
    manifest: Manifest, text_shards: Path, tmp_path: Path
) -> None:
    made = configuration()
    state = begin(made, manifest, Replicas())
    state.enter(plan_phases(made)[0])
    save_model(state, str(tmp_path), str(text_shards / "tokenizer"), first=True)
    folder = str(tmp_path / "model")
    assert read_folder(folder).config.max_tokens == 128
    again = begin(configuration(model={"start": folder}), manifest, Replicas())
    for mine, theirs in zip(again.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    grown = {"tile_from": folder, "hidden_size": 64, "intermediate_size": 96, "num_layers": 4, "num_heads": 4}
    large = begin(configuration(model=grown), manifest, Replicas()).model.language_model
    small = state.model.language_model
    assert torch.equal(large.model.layers[0].mlp.Wo.weight[16:48, 24:72], small.model.layers[0].mlp.Wo.weight)  # type: ignore[union-attr, index]
    few = dataclasses.replace(manifest, vocab_size=10**6)
    with pytest.raises(InputError, match="has 16000 rows and the token shards ids up to 999999"):
        starting_shape(configuration(model={"start": folder}), few)


def test_a_fact_that_a_checkpoint_does_not_know_is_none(manifest: Manifest) -> None:
    made = configuration()
    record, shape = record_of(made, manifest), shape_of(made.model, manifest)
    check_resumable(record, shape, made, plan_phases(made), facts_of(made.objective) | {"a later one": True})


def test_what_makes_a_model_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3, where files come one by one; what stands for it here is a folder that is no `LocalFileSystem`."""
    remote, written = SubTreeFileSystem(str(tmp_path), LocalFileSystem()), []
    monkeypatch.setattr(state_module.storage, "filesystem", lambda uri: (remote, "run"))
    monkeypatch.setattr(state_module, "copy_file", lambda source, path, target, name: written.append(name))
    monkeypatch.setattr(state_module, "write_file", lambda output, name, data: written.append(name))

    def write(folder: Path) -> Path:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        return folder

    write_model("s3://bucket/run", 7, write)  # type: ignore[arg-type]
    assert sorted(written[:-2]) == [
        f"run/model/{n}" for n in ("1_Pooling/config.json", "model.safetensors", "tokenizer.json")
    ]
    assert written[-2:] == ["run/model/config.json", "model.json"]


def test_a_model_is_of_a_step_and_whole(tmp_path: Path) -> None:
    """What an earlier end of the same run left, or a write that was cut off, is none."""

    def write(folder: str | Path) -> Path:
        Path(folder).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).write_bytes(b"{}")
        return Path(folder)

    assert not has_model(str(tmp_path), 7)
    write(tmp_path / "model")
    assert not has_model(str(tmp_path), 7)
    write_model(str(tmp_path), 7, write)
    assert has_model(str(tmp_path), 7)
    assert not has_model(str(tmp_path), 8)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert not has_model(str(tmp_path), 7)


def test_bytes_of_a_checkpoint_are_about_right(manifest: Manifest) -> None:
    made = configuration()
    state = begin(made, manifest, Replicas())
    checkpoint = take_down(state, made, plan_phases(made), facts_of(made.objective), first=True)
    assert checkpoint is not None
    real = sum(t.numel() * t.element_size() for t in checkpoint.tensors.values())
    assert checkpoint_bytes(shape_of(made.model, manifest), average=False) == pytest.approx(real, rel=0.02)
