"""What a cluster has decides how many actors there are and what each asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.resources import CPUS_PER_SLOT, Machine, Pool, bring_machine, find_machines, plan_pool, threads_here

HEAD = Machine(cpus=2, gpus=0, now=1, most=1)


@pytest.mark.parametrize(
    ("machines", "gpu", "pool"),
    [
        # Three machines of 4 CPUs: an actor on each takes 3 and leaves 1 to its readers.
        ([Machine(4, 0, 3, 3)], False, Pool(1, 3, 3, cpus=3, gpus=0, slot=4)),
        # Machines of 64 CPUs beside a small head: eight actors on each, none on the head.
        ([HEAD, Machine(64, 0, 2, 2)], False, Pool(1, 16, 16, cpus=7, gpus=0, slot=8)),
        # A cluster that starts empty begins with as little as it may, and may grow.
        ([HEAD, Machine(16, 0, 0, 10)], False, Pool(1, 1, 20, cpus=7, gpus=0, slot=8)),
        # A single machine leaves two.
        ([HEAD, Machine(4, 0, 1, 1)], False, Pool(1, 1, 1, cpus=2, gpus=0, slot=4)),
        # GPUs: one each, whatever CPUs there are.
        ([HEAD, Machine(32, 4, 1, 3), Machine(64, 0, 5, 5)], True, Pool(1, 4, 12, cpus=1, gpus=1, slot=1)),
        # The smallest cluster there is.
        ([Machine(1, 0, 1, 1)], False, Pool(1, 1, 1, cpus=1, gpus=0, slot=1)),
    ],
)
def test_pools(machines, gpu, pool):
    assert plan_pool(machines, gpu=gpu) == pool


def test_a_size_that_is_asked_for():
    machines = [Machine(4, 0, 1, 5)]
    assert plan_pool(machines, gpu=False, asked=(2, 4)) == Pool(2, 2, 4, cpus=3, gpus=0, slot=4)
    assert plan_pool(machines, gpu=False, asked=(3, 3)) == Pool(3, 3, 3, cpus=3, gpus=0, slot=4)
    with pytest.raises(ValueError, match="6 actors will never fit on this cluster, it has 1 slots of 4 CPUs"):
        plan_pool(machines, gpu=False, asked=(1, 6))
    # Where nobody says how far the cluster may grow, what is asked for is believed.
    one = [Machine(4, 0, 1, 1)]
    assert plan_pool(one, gpu=False, asked=(1, 6), limited=False) == Pool(1, 1, 6, cpus=3, gpus=0, slot=4)
    assert plan_pool(one, gpu=False, limited=False) == Pool(1, 1, 1, cpus=2, gpus=0, slot=4)


@given(
    st.lists(st.tuples(st.integers(1, 128), st.integers(0, 8), st.integers(0, 9), st.integers(0, 9)), min_size=1),
    st.booleans(),
)
def test_every_pool_fits_when_the_cluster_is_whole(kinds, gpu):
    machines = [Machine(cpus, gpus, now, now + more) for cpus, gpus, now, more in kinds if now + more]
    if not machines or (gpu and not any(machine.gpus for machine in machines)):
        return
    pool = plan_pool(machines, gpu=gpu)
    assert 1 <= pool.least <= pool.first <= pool.most
    if gpu:
        assert pool.most == sum(machine.gpus * machine.most for machine in machines)
    else:
        assert pool.cpus < pool.slot or pool.slot == 1
        assert pool.slot <= CPUS_PER_SLOT
        assert pool.most == sum(machine.cpus // pool.slot * machine.most for machine in machines)


def test_a_real_session_is_one_machine(ray_session):
    assert bring_machine(gpu=False), "it is there"
    assert not bring_machine(gpu=True, patience_s=0.1), "and no autoscaler that would bring a GPU"
    assert find_machines() == [Machine(cpus=4, gpus=0, now=1, most=1)]
    assert threads_here(4) == threads_here(100) >= threads_here(1) >= 1
