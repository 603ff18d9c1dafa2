"""The watch: what died together is gone through alone, what died alone twice is given up, nothing goes on for ever."""

import subprocess
import sys

import pyarrow as pa
import pytest

from pipeline.quarantine import (
    MOST_DEATHS_ALONE,
    MOST_DEATHS_TOGETHER,
    MOST_QUARANTINED,
    MOST_STARTS,
    Guard,
    Watch,
    start_watch,
)


class Killed(BaseException):
    """The worker is gone: nothing after this line of it runs."""


class Direct:
    """A watch in this process, called as Ray actors are."""

    def __init__(self, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watch = watch
        monkeypatch.setattr("ray.get", lambda value: value)

    def __getattr__(self, name: str):
        return type("Method", (), {"remote": staticmethod(getattr(self.watch, name))})


def table_of(names: list[str]) -> pa.Table:
    return pa.table({"document_id": names, "text_hash": pa.array([n.encode() * 2 for n in names])})


def run(
    guard: Guard, table: pa.Table, poison: set[str], fatal_together: bool = False
) -> tuple[list[str], list[str], int]:
    """(embedded, given up, workers lost) of a table, over as many workers as it takes."""
    lost = 0
    given_up: list[str] = []

    def work(part: pa.Table) -> list[str]:
        names = part["document_id"].to_pylist()
        if poison & set(names) or (fatal_together and len(names) > 1):
            raise Killed
        return names

    def give_up(one: pa.Table) -> list[str]:
        given_up.extend(one["document_id"].to_pylist())
        return []

    while True:
        given_up.clear()
        try:
            results = guard.run(table, work, give_up)
        except Killed:
            lost += 1
            continue
        guard.end(table)
        return [name for result in results for name in result], given_up, lost


@pytest.mark.parametrize("poison", [[], ["c"], ["a", "e"], ["a", "b", "c", "d", "e"]])
def test_poison_is_found_alone_and_costs_a_bounded_number_of_workers(poison, monkeypatch):
    guard = Guard(Direct(Watch(1), monkeypatch), "embed")
    names = list("abcde")
    embedded, given_up, lost = run(guard, table_of(names), set(poison))
    assert embedded == [name for name in names if name not in poison]
    assert given_up == poison
    assert lost == (MOST_DEATHS_ALONE * len(poison) + 1 if poison else 0)


def test_only_document_of_a_table(monkeypatch):
    guard = Guard(Direct(Watch(1), monkeypatch), "embed")
    assert run(guard, table_of(["x"]), {"x"}) == ([], ["x"], 3)


def test_a_table_too_large_for_its_worker_goes_through_piece_by_piece(monkeypatch):
    guard = Guard(Direct(Watch(1), monkeypatch), "embed")
    assert run(guard, table_of(list("abc")), set(), fatal_together=True) == (list("abc"), [], 1)


def test_a_lost_output_is_no_death(monkeypatch):
    guard = Guard(Direct(Watch(1), monkeypatch), "embed")
    calls = []
    for _ in range(3):
        guard.run(table_of(list("abc")), lambda part: calls.append(len(part)), lambda part: None)
        guard.end(table_of(list("abc")))
    assert calls == [3, 3, 3]


def test_stages_do_not_blame_each_other(monkeypatch):
    watch = Direct(Watch(1), monkeypatch)
    tokenize, embed = Guard(watch, "tokenize"), Guard(watch, "embed")
    with pytest.raises(Killed):
        tokenize.run(table_of(["a", "b"]), lambda part: (_ for _ in ()).throw(Killed), lambda part: None)
    assert embed.run(table_of(["a", "b"]), len, len) == [2]
    assert tokenize.run(table_of(["a", "b"]), len, len) == [1, 1]


def test_what_kills_without_a_document_to_blame_ends_the_run():
    watch = Watch(1)
    watch.begin(b"t")
    for _ in range(MOST_DEATHS_TOGETHER):
        assert watch.begin(b"t")
        watch.alone(b"t", b"d")
        watch.alone(b"t", None)
    with pytest.raises(RuntimeError, match=r"block_chars"):
        watch.begin(b"t")


def test_many_documents_that_kill_end_the_run():
    watch = Watch(1)
    watch.begin(b"t")
    for number in range(MOST_QUARANTINED + 1):
        for _ in range(MOST_DEATHS_ALONE):
            assert watch.alone(b"t", b"%d" % number) < MOST_DEATHS_ALONE
            watch.begin(b"t")
    with pytest.raises(RuntimeError, match="the machine or the model is broken"):
        watch.alone(b"t", b"another")


def test_workers_that_die_while_they_load_end_the_run():
    watch = Watch(2)
    for _ in range(MOST_STARTS + 1):
        watch.start()
    watch.begin(b"t")
    for _ in range(MOST_STARTS + 2):
        watch.start()
    with pytest.raises(RuntimeError, match="while they loaded the model"):
        watch.start()


def test_nothing_is_watched_without_a_watch():
    guard = Guard(None, "embed")
    guard.start()
    assert guard.run(table_of(["a", "b"]), len, len) == [2]
    guard.end(table_of(["a", "b"]))


@pytest.mark.usefixtures("ray_session")
def test_the_watch_is_an_actor():
    guard = Guard(start_watch(1), "embed")
    guard.start()
    table = table_of(["a", "b"])
    assert guard.run(table, len, len) == [2]
    assert guard.run(table, len, len) == [1, 1]
    guard.end(table)


def test_tokens_of_work_that_is_begun_again_are_wasted(monkeypatch):
    watch = Watch(1)
    table = table_of(["a", "b"]).append_column("tokens", pa.array([[1, 2, 3], [4]]))
    guard = Guard(Direct(watch, monkeypatch), "embed")
    guard.run(table, lambda part: [], lambda one: [])
    assert watch.wasted() == 4  # if nothing more comes of it
    guard.end(table)
    assert watch.wasted() == 0
    # Its result was lost with its machine, and so was the second worker's in the middle of it.
    guard.run(table, lambda part: [], lambda one: [])
    assert watch.wasted() == 8
    guard.run(table, lambda part: [], lambda one: [])
    guard.end(table)
    assert watch.wasted() == 8


def test_documents_without_tokens_waste_none(monkeypatch):
    watch = Watch(1)
    guard = Guard(Direct(watch, monkeypatch), "tokenize")
    guard.run(table_of(["a"]), lambda part: [], lambda one: [])
    assert watch.wasted() == 0


def test_nothing_is_watched_without_ray() -> None:
    """A single process has no watch, and is to start without importing Ray."""
    code = (
        "import sys\n"
        "from pipeline.quarantine import Guard\n"
        "Guard(None, 'embed').start()\n"
        "sys.exit('ray' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
