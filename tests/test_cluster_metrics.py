"""What is counted: scraped from the page of a real Ray, with the values of a run's report; and the board draws it."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.metrics import METRICS, SWITCH, RayMeter, exported, is_collected
from jobs.configuration import EmbedConfiguration
from jobs.embed import run_embed

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "cluster" / "grafana.json"
SAMPLE = re.compile(r'^(ray_nightloom_\w+)\{.*table="([^"]*)".*\} (\S+)$', re.MULTILINE)


def expressions(node: object) -> Iterator[str]:
    """Every query in a board, wherever it stands."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("expr", "query") if isinstance(node.get(key), str))
        yield from (query for value in node.values() for query in expressions(value))
    elif isinstance(node, list):
        yield from (query for value in node for query in expressions(value))


def test_the_board_asks_for_what_is_counted_and_for_all_of_it():
    names = re.findall(r"\bray_\w+", " ".join(expressions(json.loads(BOARD.read_text()))))
    histograms = {name for name, kind in exported().items() if kind == "histogram"}
    asked = {next((h for h in histograms if name.startswith(h)), name) for name in names}
    assert asked == set(exported())


def test_the_documentation_names_every_metric():
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [name for name in exported() if f"`{name}`" not in text] == []


def test_counts_are_collected_on_a_cluster_or_where_the_environment_says_so(monkeypatch):
    assert [is_collected(None), is_collected("auto")] == [False, True]
    monkeypatch.setenv(SWITCH, "on")
    assert is_collected(None)
    monkeypatch.setenv(SWITCH, "off")
    assert not is_collected("auto")


def test_a_name_that_is_not_declared_is_a_fault():
    with pytest.raises(KeyError):
        RayMeter("t").add(dokuments=1)


def page() -> str:
    import ray

    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        return answer.read().decode()


def samples() -> dict[tuple[str, str], float]:
    """{(name on the page, table): sum over processes}."""
    found: dict[tuple[str, str], float] = {}
    for name, table, value in SAMPLE.findall(page()):
        found[name, table] = found.get((name, table), 0.0) + float(value)
    return found


def test_a_page_that_prometheus_reads_has_the_numbers_of_the_report(
    tmp_path, tiny_model_folder, ray_session, monkeypatch
):
    import ray

    monkeypatch.setenv(SWITCH, "on")
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"document {number} about vectors " * (number + 1))
    sets = {"compute": {"actors": 1}, "vectors": {"dtype": "float32"}}
    uri = str(tmp_path / f"metrics-{tmp_path.name}.lance")
    report = run_embed(
        EmbedConfiguration.model_validate(
            {"source": str(source), "table": uri, "model": str(tiny_model_folder), **sets}
        )
    )

    class Other:
        def count(self) -> None:
            meter = RayMeter("s3://secret:key@bucket/folder/other.lance/")
            for name, metric in METRICS.items():
                how = {"counter": meter.add, "gauge": meter.set, "histogram": meter.observe}[metric.kind]
                how(**{name: 2})
            meter.add(documents=0)

    other = ray.remote(Other).options(num_cpus=0).remote()
    ray.get(other.count.remote())
    table, until = Path(uri).name, time.monotonic() + 120
    wanted = set(exported()) - {"ray_nightloom_block_seconds"} | {"ray_nightloom_block_seconds_count"}
    while True:  # processes bring their counts every ten seconds
        found = samples()
        have = {name for name, of in found if of == "other.lance"}
        if wanted <= have and ("ray_nightloom_documents_total", table) in found:
            break
        assert time.monotonic() < until, wanted - have
        time.sleep(1)
    assert have <= wanted | {f"ray_nightloom_block_seconds_{part}" for part in ("bucket", "sum")}
    assert found["ray_nightloom_documents_total", "other.lance"] == 2
    assert found["ray_nightloom_documents_total", table] == report.embedded == 6
    assert found["ray_nightloom_tokens_total", table] == report.tokens
    assert found["ray_nightloom_vectors_total", table] == report.chunks
    assert found["ray_nightloom_waiting_documents", table] == 0
    assert ("ray_nightloom_dead_documents_total", table) not in found
    assert "secret" not in page()
