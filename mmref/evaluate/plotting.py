"""Figures of the reports: plain axes, and inline SVG in the colours of the page."""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Colours are drawn under placeholder names, which become CSS variables: the page's light and dark palettes apply.
# The series are Okabe and Ito's colour-blind safe ones, and each has a line style of its own.
INK, FAINT, PAGE = "#010101", "#020202", "#030303"
CSS_COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", PAGE: "var(--page)"}
CSS_COLOURS |= {f"#0{i}0000": f"var(--series-{i})" for i in range(1, 6)}


@contextlib.contextmanager
def own_style(**more: Any) -> Iterator[None]:
    """Draw as matplotlib does by itself, whatever the user's matplotlibrc says: of LaTeX for all texts, for one."""
    with matplotlib.style.context(["default", more]):
        yield


def axes_of(x_label: str, y_label: str) -> tuple[Figure, Any]:
    """A figure of one plain set of axes, whole numbers on the horizontal one."""
    figure = Figure(figsize=(5.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    plain(axes, x_label, y_label)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    return figure, axes


def plain(axes: Any, x_label: str, y_label: str) -> None:
    """Axes in the style of the reports: labels, and faint lines left, below and across."""
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    axes.set_xlabel(x_label, color=INK, fontsize=10)
    axes.set_ylabel(y_label, color=INK, fontsize=10)


def legend(axes: Any, columns: int = 5) -> None:
    """The series by name, above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK, fontsize=9.5,
        handlelength=2.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure as inline SVG whose colours are the page's; `name` keeps its ids apart from other figures'."""
    text = io.StringIO()
    # Text stays text: small, selectable, in the page's font. The salt keeps the ids of two figures apart.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and its DTD's address
    # Inside HTML the namespaces are implied; without them the page holds no address at all.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    for placeholder, variable in CSS_COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return Markup(svg)  # matplotlib has escaped the labels
