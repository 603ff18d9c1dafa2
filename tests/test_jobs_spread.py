"""How embedding is spread: over a local session by its cores, over a cluster by what it has."""

from types import SimpleNamespace

import pytest

from jobs import spread as spreading
from jobs.configuration import ComputeSettings
from jobs.spread import (
    BLOCK_CHARS,
    NoMachineError,
    choose_device,
    dtype_of_workers,
    is_little,
    plan_single,
    plan_workers,
)
from model.errors import InputError

pytestmark = pytest.mark.usefixtures("ray_session")  # of four logical CPUs


def spread(**settings: object) -> tuple[int | None, ...]:
    workers = plan_workers(ComputeSettings.model_validate(settings), "cpu")
    return workers.least, workers.first, workers.actors, workers.cpus


def test_a_local_session_keeps_two_cpus_free(monkeypatch):
    monkeypatch.delenv("NIGHTLOOM_ADDRESS", raising=False)
    assert spread(actors=2) == (2, 2, 2, 1)
    assert spread(actors="1:2") == (1, 2, 2, 1)
    with pytest.raises(InputError, match=r"compute\.actors is 3, this session has room for 2"):
        spread(actors="1:3")


def test_a_cluster_is_looked_at(monkeypatch):
    monkeypatch.setenv("NIGHTLOOM_ADDRESS", "auto")
    assert spread() == (1, 1, 1, 2)  # one machine, of whose four CPUs two are kept free
    workers = plan_workers(ComputeSettings(), "cpu")
    assert callable(workers.threads)
    assert workers.threads() >= 1
    assert workers.share == 1.0
    assert spread(actors="1:3") == (1, 1, 3, 3), "an autoscaler may bring machines for them"
    limits = SimpleNamespace(node_group_configs=[])
    monkeypatch.setattr("cluster.resources.read_limits", lambda: limits)
    monkeypatch.setattr(spreading, "read_limits", lambda: limits)
    with pytest.raises(InputError, match=r"compute\.actors: 2 actors will never fit on this cluster"):
        spread(actors=2)


def test_device_and_precision_are_those_of_the_machines(monkeypatch):
    monkeypatch.setenv("NIGHTLOOM_ADDRESS", "auto")
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    monkeypatch.setattr(spreading, "bring_machine", lambda *, gpu: False)  # no autoscaler brings one
    with pytest.raises(NoMachineError, match="no GPU for an actor, and no machine with one came; try again later"):
        choose_device("cuda")  # a shortage, not a mistake
    with pytest.raises(NoMachineError, match="no CPU for an actor"):
        dtype_of_workers("auto", "cpu")
    monkeypatch.delenv("NIGHTLOOM_ADDRESS")
    with pytest.raises(InputError, match="there is no GPU here"):
        choose_device("cuda")
    assert dtype_of_workers(None, "cpu") in ("float32", "bfloat16")


def test_little_work_is_one_process_and_needs_no_ray(monkeypatch):
    monkeypatch.delenv("NIGHTLOOM_ADDRESS", raising=False)
    monkeypatch.setattr(spreading, "physical_cores", lambda: 4)
    limit = ComputeSettings().single_chars
    assert not is_little(ComputeSettings(), 1)  # a session is there: nothing has to be waited for
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert is_little(ComputeSettings(), limit)
    assert not is_little(ComputeSettings(), limit + 1)
    assert not is_little(ComputeSettings(address="auto"), 1)
    assert not is_little(ComputeSettings(single_chars=0), 1)
    workers = plan_single(ComputeSettings(), "cpu")
    assert (workers.actors, workers.threads, workers.block_chars) == (1, 4, BLOCK_CHARS["cpu"])


def test_what_several_actors_would_share_is_not_little(monkeypatch):
    """But for one unit of work, which one actor gets in any case."""
    monkeypatch.delenv("NIGHTLOOM_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(spreading, "physical_cores", lambda: 32)
    for settings in (ComputeSettings(), ComputeSettings.model_validate({"actors": 2})):
        assert is_little(settings, BLOCK_CHARS["cpu"])
        assert not is_little(settings, BLOCK_CHARS["cpu"] + 1)
    assert is_little(ComputeSettings.model_validate({"actors": 1}), BLOCK_CHARS["cpu"] + 1)
