"""The charts of a table's page, drawn by matplotlib as SVG that follows the page: its colours are the page's variables,
so that light and dark need one drawing, its text is text, and its width is whatever room there is.

Legends and titles are the page's own, in HTML, where they wrap and can be read aloud.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 360, 200
"""Units of a chart: about pixels, at the width that a chart has on a phone and in a column of a desktop."""
INK, FAINT, PAPER = "#0a0101", "#0a0102", "#0a0103"
SERIES = tuple(f"#0b01{number:02x}" for number in range(8))
"""Colours that stand for variables of the page's style: ink, faint, card, s0 to s7."""
VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "card", **{color: f"s{i}" for i, color in enumerate(SERIES)}}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nightloom",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}


def draw(name: str, about: str, paint: Any, *, height: int = HEIGHT) -> str:
    """An SVG element of what `paint` puts on empty axes.

    Args:
        name: begins the ids within, so that several charts fit on one page.
        about: what the chart shows, for those who cannot see it.
        paint: called with the axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return for_page(text.getvalue(), name, about)


def for_page(svg: str, name: str, about: str) -> str:
    """A drawing of matplotlib's as part of a page: ids of its own, the page's font and colours, no fixed size."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font(-family)?: ([^;\"]*?)'[^;\"]*", lambda m: f"font: {m[2]}inherit" if not m[1] else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    head = f'<svg class="chart" role="img" aria-label="{escape(about)}" data-chart="{name}" {view[0]}'
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :].strip()


def short(value: float, _: Any = None) -> str:
    """1234567 -> "1.2M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def scaled(axes: Any, label: str) -> None:
    """A value axis from zero with few lines, named above it, where a name needs no room beside it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)
    axes.set_title(label, loc="left", fontsize=10, color=INK)


def bars_of_nights(labels: Sequence[str], series: Sequence[Sequence[float]], unit: str) -> Any:
    """One bar a night, in parts that stand on each other in the order of the colours; the newest has full strength."""

    def paint(axes: Any) -> None:
        at, base = np.arange(len(labels)), np.zeros(len(labels))
        for values, color in zip(series, SERIES, strict=False):
            strength = [0.55] * (len(labels) - 1) + [1.0] if len(series) == 1 else None
            drawn = axes.bar(at, values, 0.72, bottom=base, color=color)
            for bar, alpha in zip(drawn, strength or [], strict=False):
                bar.set_alpha(alpha)
            base += np.asarray(values, float)
        scaled(axes, unit)
        axes.set_xlim(-0.6, max(len(labels), 6) - 0.4)
        step = -(-len(labels) // 6)
        shown = at[::-1][::step][::-1]
        axes.set_xticks(shown, [labels[i] for i in shown])
        axes.tick_params(axis="x", length=0)

    return paint


def line_over_time(seconds: np.ndarray, values: np.ndarray, unit: str) -> Any:
    """A rate over the time of a run: each value holds up to its second."""

    def paint(axes: Any) -> None:
        scale, name = (
            (3600, "hours") if seconds[-1] > 7200 else (60, "minutes") if seconds[-1] > 180 else (1, "seconds")
        )
        x = np.concatenate([[0], seconds]) / scale
        y = np.concatenate([values[:1], values])
        axes.fill_between(x, y, step="pre", color=SERIES[0], alpha=0.18, linewidth=0)
        axes.step(x, y, where="pre", color=SERIES[0], linewidth=1.6)
        scaled(axes, unit)
        axes.set_xlim(0, x[-1])
        axes.set_xlabel(f"{name} since the work began", fontsize=10)

    return paint


def lengths(edges: Sequence[int], counts: Sequence[int], median: float) -> Any:
    """Documents by their tokens, in the half octaves of `pipeline.measures`."""

    def paint(axes: Any) -> None:
        left = np.asarray(edges, float)
        axes.bar(left, counts, width=left * 0.41, align="edge", color=SERIES[0])
        axes.set_xscale("log", base=2)
        axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        scaled(axes, "documents")
        low, high = left[0], left[-1] * 1.5
        octaves = np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
        octaves = octaves[:: max(1, len(octaves) // 6)]
        axes.set_xticks(2**octaves, [f"{int(2**o):,}" if o < 14 else short(2**o) for o in octaves])
        axes.minorticks_off()
        axes.set_xlim(low * 0.9, high)
        axes.set_xlabel("tokens of a document", fontsize=10)

    return paint


def shares(names: Sequence[str], values: Sequence[float]) -> Any:
    """Outcomes as shares of what was planned, with a line at the plan."""

    def paint(axes: Any) -> None:
        at = np.arange(len(names))[::-1]
        axes.barh(at, values, 0.6, color=SERIES[0])
        axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        most = max(*values, 1.0)
        for y, value in zip(at, values, strict=True):
            inside = value > 0.2 * most
            axes.text(
                value + most * (-0.02 if inside else 0.02),
                y,
                f"{value:.0%}",
                va="center",
                ha="right" if inside else "left",
                color=PAPER if inside else INK,
            )
        axes.set_yticks(at, names)
        axes.set_xlim(0, most * 1.08)
        axes.set_xticks([0, 1], ["0", "as planned"])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)

    return paint


def scatter(points: np.ndarray, groups: Sequence[np.ndarray]) -> Any:
    """Points of shape (n, 2), coloured by group; smaller groups lie on top."""

    def paint(axes: Any) -> None:
        size = float(np.clip(6000 / max(len(points), 1), 4, 26))
        for number in np.argsort([-len(members) for members in groups], kind="stable"):
            chosen = points[groups[number]]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=SERIES[number], linewidths=0, alpha=0.75)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.margins(0.02)
        axes.set_aspect("equal", adjustable="datalim")

    return paint
