"""The page of a table: well formed, whole in itself, every text escaped, every chart there, and its titles true."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import DRIVER, PROGRAM, browser
from pages import TRICKY, make_table
from test_pipeline_recipe import RECIPE

from jobs.cli import main
from jobs.page import make_page, run_report, table_of
from model.errors import InputError
from pipeline.ledger import keep_record, read_records
from pipeline.table import PAGE, EmbeddingTable

CHARTS = {"course", "lengths", "plan", "speed", "documents", "map"}
VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """The tree of a page; a tag that is closed wrongly is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.charts: dict[str, str] = {}
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [str(found[name]) for name in ("href", "src", "xlink:href", "action") if name in found]
        if "data-chart" in found:
            self.charts[str(found["data-chart"])] = str(found["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return make_table(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(uri) -> str:
    return make_page(uri)


def test_it_is_well_formed_and_every_chart_is_there(page):
    outline = Outline(page)
    assert set(outline.charts) == CHARTS
    assert len(outline.ids) == len(set(outline.ids))
    charts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert len(charts) == len(CHARTS)
    for chart in charts:
        drawn = ET.fromstring(chart)
        shapes = [node for node in drawn.iter() if node.tag.endswith(("}path", "}use"))]
        assert len(shapes) > 4
        assert "#0a01" not in chart  # a colour that stands for a variable
        assert "#0b01" not in chart
        assert "font-family" not in chart
    # The charts carry what they are about for those who cannot see them: the sentence above them.
    for about in outline.charts.values():
        assert f"<figcaption>{about.replace(chr(39), '&#x27;')}</figcaption>" in page


def test_it_asks_nothing_of_a_network_and_runs_nothing(page):
    outline = Outline(page)
    assert [link for link in outline.links if not link.startswith(("#", "data:"))] == []
    assert not {"script", "iframe", "object", "form", "img"} & outline.tags
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page
    assert len(page) < 300_000


def test_texts_are_escaped(page):
    assert "<script" not in page
    assert TRICKY not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; $a_b$ &amp; &#x27;quoted&#x27;" in page
    assert "models/&lt;b&gt;ours&lt;/b&gt;" in page


def test_titles_say_what_the_records_say(uri, page):
    newest = read_records(uri)[-1]
    counts, planned = newest["report"], newest["planned"]["documents"]
    assert f"<h1>{counts['embedded']:,} documents embedded, 410 left for the next night</h1>" in page
    assert f"{counts['embedded']:,} of {planned:,} planned documents were embedded" in page
    assert "First vectors after 9.0 s, then steady to the end" in page
    assert re.search(r"Half of the documents have under \d+ tokens; no position was padding", page)
    assert re.search(r"9\d% of the documents are nearest to one of their own source; by chance 33% would be", page)
    assert "Dead letters: 2 documents without vectors" in page
    assert "it killed its worker twice" in page
    assert "Gates: all 6 passed" in page
    assert "Nearest to manual/0" in page
    assert "says something of its own." in page  # read from its source


def test_the_same_table_gives_the_same_page(uri, page):
    assert make_page(uri) == page


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"status": "failed", "report": None, "error": "the disk <is> full"},
            "newest run failed: the disk &lt;is&gt; full",
        ),
        ({"status": "crashed", "report": None}, "The newest run crashed; what it had committed is kept"),
        ({"status": "unpublished", "reasons": ["collapse: 77% of them"]}, "Not published: collapse: 77% of them"),
    ],
)
def test_a_night_that_went_wrong_is_the_headline(tmp_path, changes, words):
    page = make_page(make_table(tmp_path, nights=2, per_source=4, last=changes))
    assert words in page
    assert ("<h2>The newest run with work, 1 Nov</h2>" in page) == ("report" in changes)
    Outline(page)
    if "reasons" in changes:
        assert "Gates: refused by collapse, collapse" in page


def test_a_start_that_found_another_at_work_is_listed_and_is_no_headline(tmp_path):
    uri = make_table(tmp_path, nights=2, per_source=4)
    about = {"job": "nightly", "status": "busy", "started": "2026-11-30T01:00:00Z", "error": "run x is at it"}
    keep_record(uri, "20261130T010000.000000Z", about)
    page = make_page(uri)
    assert "410 left for the next night</h1>" in page
    assert "run x is at it" in page


def test_tables_with_nothing_to_show(tmp_path):
    empty = EmbeddingTable.create(str(tmp_path / "empty"), replace(RECIPE, dim=4), model="m")
    page = make_page(empty.uri)
    Outline(page)
    assert "No run has written to this table yet" in page
    assert "Too few vectors are published to draw." in page
    with pytest.raises(InputError, match="there is no table at"):
        make_page(str(tmp_path / "none"))


def test_records_of_earlier_versions_have_no_lengths_and_no_timeline(tmp_path):
    changes = {"lengths": None, "timeline": None, "planned": None, "gates": None}
    uri = make_table(tmp_path, nights=1, per_source=4)
    record = read_records(uri)[0]
    keep_record(uri, record.pop("run"), {name: value for name, value in record.items() if name not in changes})
    outline = Outline(make_page(uri))
    assert set(outline.charts) == {"speed", "documents", "map"}


def test_where_it_is_written(uri, tmp_path, s3_server, monkeypatch, capsys):
    assert run_report(uri).page == f"{uri}/{PAGE}"
    size = (Path(uri) / PAGE).stat().st_size
    assert main(["report", uri, str(tmp_path / "out.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == size == (tmp_path / "out.html").stat().st_size
    assert main(["report", uri, str(tmp_path / "no" / "where" / "out.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    assert main(["report", uri, f"s3://bucket/{tmp_path.name}.html"]) == 0


def test_cells():
    drawn = table_of(["a<b", "empty", "n"], [["x" * 30, None, 1234], ["y", "", 0.5]])
    assert drawn == (
        '<table><thead><tr><th scope="col">a&lt;b</th><th scope="col" class=n>n</th></tr></thead><tbody>'
        f'<tr><td data-label="a&lt;b" class=long>{"x" * 30}</td><td data-label="n" class=n>1,234</td></tr>'
        '<tr><td data-label="a&lt;b">y</td><td data-label="n" class=n>0.5</td></tr></tbody></table>'
    )


@pytest.mark.slow
@pytest.mark.skipif(not (PROGRAM and DRIVER), reason="no chromium and chromedriver here")
@pytest.mark.parametrize("width, dark", [(1440, False), (1440, True), (390, False), (390, True)])
def test_in_a_browser(uri, tmp_path, width, dark):
    """Nothing is reported to the console, nothing reaches over the edge, every chart has a size, colours follow."""
    file = tmp_path / "page.html"
    run_report(uri, str(file))
    with browser(width, 900, dark=dark) as opened:
        opened.open(file.as_uri())
        assert opened.complaints() == []
        assert opened.run("document.documentElement.scrollWidth") <= width
        over = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        assert opened.run(f"{over}.map(e => e.tagName)") == []
        opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert opened.run("document.documentElement.scrollWidth") <= width
        sizes = opened.run("[...document.querySelectorAll('.chart')].map(e => e.getBoundingClientRect().toJSON())")
        assert len(sizes) == len(CHARTS)
        assert all(280 < size["width"] < 600 and size["height"] > 100 for size in sizes)
        paper = opened.run("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(22, 23, 25)") == dark
        fills = opened.run(
            "[...document.querySelectorAll('.chart path, .chart use')].map(e => getComputedStyle(e).fill)"
        )
        assert ("rgb(110, 168, 232)" in fills) == dark
