"""What the loop asks of an objective: next tokens beside masked ones, and one of a test's own that shares nothing with
them but the loop.
"""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_jobs_training import configuration, pretrain
from torch import Tensor, nn

from jobs.monitor import LINES, read_lines
from jobs.objective import LanguageModelling, on_device
from jobs.phases import Phase, plan_phases
from jobs.pretrain import check
from jobs.replicas import Replicas
from jobs.state import State, begin
from jobs.training import Signals, resume
from model.batch import PackedBatch
from model.encoder import Encoder
from model.errors import InputError
from model.folder import read_folder
from model.optimizer import LossScale, StableAdamW, parameter_groups
from model.schedule import SpikeGuard
from model.weights import load_decoder
from pipeline.shards import TokenShards
from pipeline.stream import Bin, Step, StreamState, TokenStream

CAUSAL = 'objective.task="causal"'


def test_a_decoder_learns_and_can_be_loaded(text_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert pretrain(text_shards, output, CAUSAL)["status"] == "done"
    lines = read_lines(output / LINES)
    assert lines[-1]["heldout_loss"] < lines[0]["loss"] - 0.5
    before = [0, *(item["tokens"] for item in lines)]
    shares = [item["masked"] / (item["tokens"] - earlier) for item, earlier in zip(lines, before, strict=False)]
    assert all(0.7 < share < 1 for share in shares), "all but the last token of a sequence has a next one"
    model = load_decoder(read_folder(output / "model", causal=True))
    assert model.model.config.global_theta == 160_000.0
    # It is the model that was trained: as good on held-out text as the last weights, or, as their average, better.
    settings = configuration(text_shards, output, CAUSAL, f"model.start={json.dumps(str(output / 'model'))}")
    shards, phase = TokenShards.open(str(text_shards)), plan_phases(settings)[-1]
    objective = LanguageModelling(shards, settings.objective, settings.keep.evaluation_bins)
    state = begin(settings, shards.manifest, Replicas())
    state.enter(phase)
    found = objective.evaluate(state, Replicas(), objective.held_out(phase, Replicas()))
    assert found["heldout_loss"] < lines[-1]["heldout_loss"] + 1e-4


def test_a_cut_decoder_goes_on_as_it_would_have(text_shards: Path, tmp_path: Path) -> None:
    for name, stops in (("whole", ["stop_after=6"]), ("cut", ["stop_after=3"]), ("cut", ["stop_after=6"])):
        pretrain(text_shards, tmp_path / name, CAUSAL, *stops)
    whole, cut = ([(i["digest"], i["loss"]) for i in read_lines(tmp_path / n / LINES)] for n in ("whole", "cut"))
    assert whole == cut


def test_what_does_not_go_together(text_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ordering_weight is for encoders"):
        check(configuration(text_shards, tmp_path / "run", CAUSAL, "objective.ordering_weight=0.1"))
    pretrain(text_shards, tmp_path / "run", "stop_after=1")
    with pytest.raises(InputError, match="another architecture: causal is False, not True"):
        check(configuration(text_shards, tmp_path / "run", CAUSAL))
    pretrain(text_shards, tmp_path / "whole")
    start = f"model.start={json.dumps(str(tmp_path / 'whole' / 'model'))}"
    with pytest.raises(InputError, match=r"holds an encoder .*; give the folder of a decoder"):
        check(configuration(text_shards, tmp_path / "other", CAUSAL, start))


class Measure(nn.Module):
    """Says from the mean vector of a sequence how long it is."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.out = encoder, nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, batch: PackedBatch, factor: float) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(batch)
        lengths = batch.cu_seqlens.diff()
        sums = torch.segment_reduce(hidden, "mean", lengths=lengths.long())
        loss = (self.out(sums).squeeze(1) - lengths / 100).square().sum()
        return loss * factor, loss.detach()


@dataclass(frozen=True)
class Lengths:
    """An objective with another model, another loss and other counts."""

    shards: TokenShards

    def steps(self, phase: Phase, start: StreamState, replicas: Replicas) -> Generator[Step, None, None]:
        return TokenStream(self.shards, phase.stream).steps(start, rank=replicas.rank, num_workers=replicas.size)

    def held_out(self, phase: Phase, replicas: Replicas) -> list[Bin]:
        return list(TokenStream(self.shards, phase.stream).evaluation(max_bins=1))

    def counts(self, step: Step) -> list[float]:
        return [sum(item.num_sequences for item in step.bins)]

    def flops(self, state: State, step: Step) -> int:
        return step.num_tokens

    def learn(
        self, state: State, replicas: Replicas, step: Step, counts: Sequence[float], factor: float
    ) -> list[float]:
        total = 0.0
        for item in step.bins:
            loss, part = state.module(on_device(item, replicas)[0], factor / counts[0])
            loss.backward()
            total += float(part)
        return [total]

    def line(self, counts: Sequence[float], sums: Sequence[float]) -> tuple[float, dict[str, Any]]:
        return sums[0] / counts[0], {"loss": sums[0] / counts[0], "accuracy": 0.0}

    def alone(self, state: State, replicas: Replicas, item: Bin | None) -> float:
        raise AssertionError("nothing diverges here")

    @torch.no_grad()
    def evaluate(self, state: State, replicas: Replicas, held_out: Sequence[Bin]) -> dict[str, float]:
        return {"heldout_loss": float(sum(state.model(on_device(b, replicas)[0], 1.0)[1] for b in held_out))}

    def facts(self) -> dict[str, Any]:
        return {"the task": "lengths"}

    def save(self, state: State, output: str, *, first: bool) -> None:
        Path(output, "saved").write_text("yes")


def test_the_loop_takes_any_objective(text_shards: Path, tmp_path: Path) -> None:
    """Frozen parameters and rates of groups included; cut and resumed it is the same."""
    outputs = {}
    for name, stops in (("whole", [None]), ("cut", [7, None])):
        for stop in stops:
            sets = ["phases.extension.weight_decay=0.0"] + ([f"stop_after={stop}"] if stop else [])
            settings = configuration(text_shards, tmp_path / name, *sets)
            shards = TokenShards.open(str(text_shards))
            encoder = begin(settings, shards.manifest, Replicas()).encoder
            encoder.embeddings.requires_grad_(False)
            torch.manual_seed(0)
            model = Measure(encoder)
            optimizer = StableAdamW(parameter_groups(model, 0.0), lr=0.0, peak_lr=1.0)
            optimizer.param_groups[0]["rate_scale"] = 0.5
            before = encoder.embeddings.tok_embeddings.weight.clone()
            state = State(model, encoder, model, optimizer, LossScale(), SpikeGuard(deviations=0))
            resume(settings, plan_phases(settings), Lengths(shards), state, Replicas(), Signals())
            assert torch.equal(before, encoder.embeddings.tok_embeddings.weight)
        outputs[name] = read_lines(tmp_path / name / LINES)
        assert (tmp_path / name / "saved").exists()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * optimizer.param_groups[1]["lr"])
    assert [i["loss"] for i in outputs["whole"]] == [i["loss"] for i in outputs["cut"]]
    assert outputs["whole"][13]["loss"] < outputs["whole"][0]["loss"], "the last step of the first phase"
