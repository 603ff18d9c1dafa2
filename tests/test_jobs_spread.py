"""How embedding is spread: over a local session by its cores, over a cluster by what it has."""

import pytest

from jobs.configuration import ComputeSettings
from jobs.spread import choose_device, dtype_of_workers, plan_workers
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
    with pytest.raises(InputError, match=r"compute\.actors: 2 actors will never fit on this cluster"):
        spread(actors=2)


def test_device_and_precision_are_those_of_the_machines(monkeypatch):
    monkeypatch.setenv("NIGHTLOOM_ADDRESS", "auto")
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match="there is no GPU here"):
        choose_device("cuda")
    assert dtype_of_workers(None, "cpu") in ("float32", "bfloat16")
