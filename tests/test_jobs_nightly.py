"""A night: what it ends with, what it leaves behind, and what it does when something is wrong."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.nightly import Night, NightlyConfiguration, NightlyReport, run_nightly
from model.errors import InputError
from model.folder import weights_hash
from pipeline.lease import Lease
from pipeline.ledger import read_records
from pipeline.table import NEXT, PAGE, EmbeddingTable


@pytest.fixture
def settings(tmp_path, tiny_model_folder) -> dict[str, object]:
    """Of one table with four documents."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ant", "bee", "cat", "dog"):
        (source / f"{name}.txt").write_text(f"the {name} in the house. " * 5)
    return {
        "source": str(source),
        "table": str(tmp_path / "table.lance"),
        "model": str(tiny_model_folder),
        "weights": weights_hash(tiny_model_folder)[:12],
        "compute": {"actors": 1},
        "vectors": {"dtype": "float32"},
    }


def night(settings: dict[str, object], **changes: object) -> Night:
    configuration = NightlyConfiguration.model_validate({"tables": {"animals": {**settings, **changes}}})
    report = run_nightly(configuration)
    kept = json.loads((Path(str(settings["table"])) / "_runs" / f"{report.tables['animals'].run}.json").read_text())
    assert kept["job"] == "nightly"
    return report.tables["animals"]


def statuses(settings: dict[str, object]) -> list[str]:
    return [record["status"] for record in read_records(str(settings["table"]))]


def test_nights_one_after_the_other(settings, ray_session, tmp_path):
    first = night(settings)
    assert (first.status, first.reason, first.report["embedded"]) == ("published", None, 4)
    assert first.page == f"{settings['table']}/{PAGE}"
    assert "4 documents embedded" in Path(first.page).read_text()
    (record,) = read_records(str(settings["table"]))
    assert record["planned"]["documents"] == 4
    assert (record["planned"]["new"], record["planned"]["changed"], record["planned"]["tokens"]) == (4, 0, None)
    assert sum(count for _, count in record["lengths"]) == 4
    assert record["timeline"]["rows"][-1][1:] == [4, record["tokens"]]
    assert record["chars"] > 0

    assert night(settings).status == "unchanged"
    (tmp_path / "source" / "ant.txt").write_text("now something else")
    changed = night(settings)
    assert (changed.status, changed.report["embedded"]) == ("published", 1)
    planned = read_records(str(settings["table"]))[-1]["planned"]
    assert (planned["documents"], planned["changed"], planned["new"]) == (1, 1, 0)
    assert planned["tokens"] > 0
    assert planned["seconds"] > 0
    assert statuses(settings) == ["published", "unchanged", "published"]

    # A line that is no JSON: one dead is more than none.
    (tmp_path / "source" / "broken.jsonl").write_text('{"id": "b", "text": "fine"}\nbroken\n')
    held_back = night(settings, max_dead=0)
    assert held_back.status == "unpublished"
    assert "max_dead: 1 of 6" in str(held_back.reason)


def test_a_model_that_is_not_the_pinned_one(settings, ray_session):
    wrong = night_without_table(settings, weights="0" * 12)
    assert wrong.status == "refused"
    assert "pinned to 000000000000" in str(wrong.reason)
    assert not Path(str(settings["table"])).exists()  # nothing was begun
    night(settings)
    assert night(settings, weights="0" * 12).status == "refused"
    assert statuses(settings) == ["published", "refused"]


def night_without_table(settings: dict[str, object], **changes: object) -> Night:
    configuration = NightlyConfiguration.model_validate({"tables": {"t": {**settings, **changes}}})
    return run_nightly(configuration).tables["t"]


def test_a_start_while_another_is_at_work(settings):
    uri = str(settings["table"])
    with Lease.take(uri, "theirs", beat_s=0.05) as lease:
        seen = night(settings)
        assert seen.status == "busy"
        assert "run theirs" in str(seen.reason)
        assert EmbeddingTable.find(uri) is None
        # One that has been at it for longer than anyone would wait is a fault.
        with lease.busy:
            object.__setattr__(lease.owner, "since", "2020-01-01 00:00:00 UTC")
        late = night(settings)
    assert (late.status, "hours: look after it" in str(late.reason)) == ("failed", True)
    assert statuses(settings) == ["busy", "failed"]


def test_a_table_that_fails_does_not_keep_the_next_from_its_night(settings, ray_session, tmp_path):
    tables = {
        "gone": {**settings, "source": str(tmp_path / "nowhere"), "table": str(tmp_path / "other.lance")},
        "animals": settings,
    }
    report = run_nightly(NightlyConfiguration.model_validate({"tables": tables}))
    assert report.status == "refused"
    assert [night.status for night in report.tables.values()] == ["refused", "published"]
    assert not (tmp_path / "other.lance").exists()
    assert report.summary().startswith("The night is refused.\n\n  gone ")
    assert json.loads(report.to_json()) == json.loads(json.dumps(asdict(report)))


def test_deadlines_are_of_the_night_not_of_the_table(settings, ray_session, tmp_path, monkeypatch):
    """A table that comes to its turn after the deadline must not have until tomorrow's."""
    import jobs.nightly
    from jobs.embed import limit_of

    seen = []

    def remember(settings, **how):
        seen.append(limit_of(settings, how["begun"]).deadline)
        raise RuntimeError("enough")

    monkeypatch.setattr(jobs.nightly, "run_embed", remember)
    tables = {name: {**settings, "deadline": "06:00"} for name in "ab"}
    report = run_nightly(NightlyConfiguration.model_validate({"tables": tables}))
    assert report.status == "failed"
    assert report.tables["a"].reason == "RuntimeError: enough"
    assert len(set(seen)) == 1
    with pytest.raises(InputError, match="no time of day"):
        run_nightly(NightlyConfiguration.model_validate({"tables": {"a": {**settings, "deadline": "soon"}}}))


@pytest.mark.parametrize(
    "became, status, code",
    [
        (("published", "busy", "unchanged", "partial"), "done", 0),
        (("published", "unpublished"), "unpublished", 3),
        (("unpublished", "refused"), "refused", 2),
        (("failed", "refused", "unpublished"), "failed", 1),
    ],
)
def test_the_exit_status_is_that_of_the_worst_table(tmp_path, monkeypatch, capsys, became, status, code):
    import jobs.nightly

    names = iter(became)
    monkeypatch.setattr(
        jobs.nightly, "run_night", lambda name, settings, begun: Night(settings.table, "r", next(names), "because")
    )
    file = tmp_path / "nightly.toml"
    keys = 'source = "s"\ntable = "t"\nmodel = "m"\n'
    file.write_text("".join(f"[tables.t{number}]\n{keys}" for number in range(len(became))))
    assert main(["nightly", str(file), "--json"]) == code
    assert NightlyReport(**json.loads(capsys.readouterr().out)).status == status


def test_wrong_configurations(tmp_path, capsys):
    file = tmp_path / "nightly.toml"
    file.write_text('[tables.a]\nsource = "s"\ntable = "t"\nmodel = "m"\nmax_ded = 3\n')
    assert main(["nightly", str(file)]) == 2
    assert "'tables.*.max_dead'" in capsys.readouterr().err
    file.write_text("")
    assert main(["nightly", str(file)]) == 2
    assert "tables" in capsys.readouterr().err
    file.write_text('[tables.a]\nsource = "s"\ntable = "t"\nmodel = "m"\nweights = "abc"\n')
    assert main(["nightly", str(file)]) == 2
    assert "tables.a.weights is 'abc'" in capsys.readouterr().err


def test_the_model_is_the_one_that_comes_with_nightloom_unless_one_is_named(tmp_path, monkeypatch):
    table = {"source": str(tmp_path), "table": str(tmp_path / "t.lance")}
    monkeypatch.setenv("NIGHTLOOM_MODEL", "/models/mine")
    made = NightlyConfiguration.model_validate({"tables": {"a": table, "b": {**table, "model": "/models/b"}}})
    assert [settings.model for settings in made.tables.values()] == ["/models/mine", "/models/b"]


def test_a_migration_takes_its_nights(settings, tmp_path):
    """Limited nights, a night of nothing, and the setting left in place afterwards: one entry for each start."""
    assert night(settings).status == "published"
    before = EmbeddingTable.open(str(settings["table"]), "published").recipe.dim
    small = {"actors": 1, "block_chars": 100, "commit_every_s": 0}
    new = settings | {"vectors": {"dtype": "float32", "dim": 16}, "compute": small, "migrate": True}
    first = night(new, budget_tokens=1)
    assert first.status == "partial"
    assert EmbeddingTable.open(str(settings["table"]), "published").recipe.dim == before
    second = night(new)
    assert (second.status, second.report["left"]) == ("published", 0)
    assert EmbeddingTable.open(str(settings["table"]), "published").recipe.dim == 16
    assert not (tmp_path / "table.lance" / NEXT).exists()
    (tmp_path / "source" / "ant.txt").write_text("now something else")
    third = night(new)
    assert (third.status, third.report["embedded"]) == ("published", 1)
    assert night(new).status == "unchanged"
    records = read_records(str(settings["table"]))
    assert [r["status"] for r in records if r["job"] == "nightly"] == [
        *("published", "partial", "published", "published", "unchanged")
    ]
    # The night after the migration is told in full, like any other.
    assert records[-2]["planned"]["changed"] == 1
