"""Drawings that belong to a page: its colours, its font, ids of their own, and text as text."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jobs import charts

KINDS = {
    "bars": charts.bars_of_nights(["1 Nov", "2 Nov"], [[3, 4], [1, 0]], "documents"),
    "line": charts.line_over_time(np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 5.0]), "tokens a second"),
    "lengths": charts.lengths([64, 91, 128], [3, 9, 2], 100.0),
    "shares": charts.shares(["documents", "tokens"], [0.05, 1.3]),
    "scatter": charts.scatter(np.random.default_rng(0).normal(size=(20, 2)), [np.arange(12), np.arange(12, 20)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_chart_is_whole_and_the_same_every_time(kind):
    svg = charts.draw(kind, 'about "this" & that', KINDS[kind])
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'about "this" & that'
    assert root.get("width") is None
    assert root.get("viewBox").startswith("0 0 360 ")
    assert svg == charts.draw(kind, 'about "this" & that', KINDS[kind])
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert all(name.startswith(f"{kind}-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)
    colors = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert colors <= {"#ffffff", "#000000"}  # of what is invisible: nothing else escapes the page's variables
    assert "var(--s0)" in svg
    assert len(svg) < 40_000


def test_text_is_text_and_no_formula():
    label = "<i>$x_1$</i> & more"
    svg = charts.draw("t", "t", charts.bars_of_nights([label], [[1]], "unit <b>"))
    texts = ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")]
    assert label in texts
    assert "unit <b>" in texts


@pytest.mark.parametrize("value, text", [(0, "0"), (950, "950"), (1234, "1.23k"), (2_500_000, "2.5M"), (3e9, "3G")])
def test_short_numbers(value, text):
    assert charts.short(value) == text
