"""The figures of a report, as SVG elements that take colour and font of the text around them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bqnn.bayes.base import BayesLayer
from bqnn.core.extras import needs
from bqnn.core.precision import wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's colours, told apart by readers who do not see all hues, those that are seen on white and black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 2", "2 2")  # once the colours are used up
TEXT = "#010203"  # stands for the colour of the text; replaced in the SVG
LEVEL, THRESHOLD, MEANS = "#d55e00", "#009e73", "#0072b2"
BINS = 150
TAIL = 5e-4  # share of the means at either end that a histogram does not reach out for
MARGIN = 0.03  # share of a histogram's width that is left free at either side
SIZE, WIDE = (4.2, 2.5), (8.6, 2.5)  # inches
MANY_LEVELS = 8  # more of them are drawn in a wide figure
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bqnn",
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
}


class Curve(NamedTuple):
    """A line of a figure: y by x, and its place in the order of the page, which sets colour and dashes.

    Of a histogram, ``x`` are the edges, one more than ``y``.
    """

    x: Sequence[float]
    y: Sequence[float]
    order: int


def line_style(order: int) -> tuple[str, str]:
    """Colour and SVG dash array of the line with that place in the order."""
    return COLOURS[order % len(COLOURS)], DASHES[order // len(COLOURS) % len(DASHES)]


class _Drawing:
    """One pair of axes in matplotlib's SVG; ``key`` makes its ids unlike those of other drawings on the page."""

    def __init__(self, key: str, title: str, x_label: str, y_label: str, wide: bool = False) -> None:
        with needs("report"):
            from matplotlib import rc_context
            from matplotlib.figure import Figure

        self.key, self.title, self.wide = key, title, wide
        with rc_context(STYLE):
            self.figure = Figure(figsize=WIDE if wide else SIZE, layout="constrained")
            self.axes: Axes = self.figure.subplots()
            self.axes.set_title(title)
            self.axes.set_xlabel(x_label)
            self.axes.set_ylabel(y_label)

    def svg(self) -> str:
        from matplotlib import rc_context

        buffer = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r' id="[a-z0-9_.]+_\d+"', "", text)  # nothing refers to these
        text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{self.key}-", text)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
        text = re.sub(r"\s*\n\s*", "\n", text.replace(TEXT, "currentColor"))
        text = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
        attributes = f'role="img" aria-label="{escape(self.title)}"' + ' class="wide"' * self.wide
        return text.replace("<svg ", f"<svg {attributes} ", 1)


def _line_options(order: int) -> dict[str, Any]:
    """matplotlib's options of the line with that place in the order."""
    colour, dashes = line_style(order)
    style = (0, [float(part) / 1.5 for part in dashes.split()]) if dashes else "-"
    return {"color": colour, "linestyle": style, "linewidth": 1.5}


def draw_curves(
    key: str,
    title: str,
    curves: Sequence[Curve],
    marks: Mapping[float, str] | None = None,
    logarithmic: bool = False,
    *,
    x_label: str = "epoch",
    diagonal: bool = False,
) -> str:
    """Lines by epoch, or by another number, in one figure.

    There are vertical lines, each with its name, at ``marks``, and where ``diagonal``, one on which y is x; positive
    numbers if ``logarithmic``.
    """
    drawing = _Drawing(key, title, x_label, "")
    for mark, name in (marks or {}).items():
        drawing.axes.axvline(mark, color=TEXT, linewidth=0.8, alpha=0.6, linestyle=":")
        place: dict[str, Any] = {
            "xy": (mark, 1.0),
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
            "parse_math": False,
        }
        drawing.axes.annotate(name, xytext=(2, -2), va="top", rotation=90, fontsize=7, alpha=0.7, **place)
    if diagonal:
        drawing.axes.axline((0, 0), slope=1, color=TEXT, linewidth=0.5, alpha=0.4)
    for curve in curves:
        drawing.axes.plot(curve.x, curve.y, marker=".", markersize=4, **_line_options(curve.order))
    drawing.axes.locator_params(axis="x", integer=True)
    if logarithmic:
        _use_logarithm(drawing.axes)
    drawing.axes.grid(True, color=TEXT, alpha=0.12, linewidth=0.6)
    return drawing.svg()


def draw_histograms(key: str, title: str, histograms: Sequence[Curve], x_label: str, y_label: str) -> str:
    """The outlines of histograms over each other, with a logarithmic axis, on which one that is a spike leaves the rest
    visible."""
    drawing = _Drawing(key, title, x_label, y_label)
    for histogram in histograms:
        drawing.axes.stairs(histogram.y, histogram.x, **_line_options(histogram.order))
    _use_logarithm(drawing.axes)
    smallest = min(value for histogram in histograms for value in histogram.y if value > 0)
    drawing.axes.set_ylim(bottom=0.7 * smallest)
    return drawing.svg()


@torch.no_grad()
def draw_means(key: str, name: str, layer: BayesLayer, log_counts: bool = True) -> str:
    """The histogram of a layer's means, with a line at each level and a dashed one at each threshold.

    With a codebook an output channel, means are shown by their place in their own codebook: its levels are at 0, 1,
    ..., and what lies between two of them is linear. The axis reaches all levels and all but a few means; how many lie
    beyond it is said below.
    """
    levels, thresholds = (wide(each).cpu() for each in (layer.levels, layer.thresholds))
    means, x_label = wide(layer.mean).cpu(), "mean"
    if len(levels) > 1:
        means, x_label = place_in_codebook(means.flatten(1), levels), "mean, by its place in the channel's codebook"
        thresholds = place_in_codebook(thresholds, levels).mean(0, keepdim=True)
        levels = torch.arange(levels.shape[1], dtype=levels.dtype).unsqueeze(0)
    ordered = means.flatten().double().sort().values
    low, high = _limits(ordered, levels)
    counts, edges = torch.histogram(ordered, BINS, range=(low, high))  # of those within the range
    if beyond := len(ordered) - round(float(counts.sum())):
        x_label += f"; {beyond:,} of {len(ordered):,} lie beyond the axis"

    many = levels.shape[1] > MANY_LEVELS
    drawing = _Drawing(key, f"{name}, {len(ordered):,} weights", x_label, "weights", wide=many)
    axes = drawing.axes
    axes.stairs(counts.tolist(), edges.tolist(), fill=True, color=MEANS)
    if log_counts:
        _use_logarithm(axes)
        axes.set_ylim(0.7, 4 * float(counts.max()))  # leaves the lines of the levels room above the spikes
    _mark_levels(axes, levels[0].tolist())
    for threshold in thresholds[0].tolist():
        axes.axvline(threshold, color=THRESHOLD, linewidth=0.8, linestyle="--", zorder=0)
    return drawing.svg()


def _limits(ordered: Tensor, levels: Tensor) -> tuple[float, float]:
    """From where to where a histogram of ``ordered`` values reaches: all levels, and all values but a few."""
    cut = int(TAIL * len(ordered))
    low = min(float(ordered[cut]), float(levels.min()))
    high = max(float(ordered[len(ordered) - 1 - cut]), float(levels.max()))
    margin = MARGIN * (high - low)
    return low - margin, high + margin


def draw_occupancy(
    key: str, name: str, levels: Sequence[Sequence[float]], occupancy: Sequence[int], log_counts: bool = True
) -> str:
    """How many weights of a layer have each level, as a bar at the level.

    Args:
        key, name: of the figure, and of the layer.
        levels: a row for each codebook, of M levels each. Of several, bars are at the codes 0, 1, ..., M - 1.
        occupancy: M counts, over all codebooks.
        log_counts: a logarithmic axis.
    """
    places, x_label = list(levels[0]), "level"
    if len(levels) > 1:
        places, x_label = [float(m) for m in range(len(occupancy))], "level, by its place in the channel's codebook"
    many = len(occupancy) > MANY_LEVELS
    drawing = _Drawing(key, f"{name}, {sum(occupancy):,} weights", x_label, "weights", wide=many)
    axes = drawing.axes
    bottom = 0.7 if log_counts else 0.0
    held = [(place, count) for place, count in zip(places, occupancy, strict=True) if count]
    axes.vlines([place for place, _ in held], bottom, [count for _, count in held], color=MEANS, linewidth=5.0)
    if log_counts:
        _use_logarithm(axes)
    axes.set_ylim(bottom, (4 if log_counts else 1.1) * max(occupancy))
    _mark_levels(axes, places)
    return drawing.svg()


def _mark_levels(axes: Axes, levels: Sequence[float]) -> None:
    """A line at each level, behind the bars, and a triangle above, which no bar reaches."""
    for level in levels:
        axes.axvline(level, color=LEVEL, linewidth=1.0, zorder=0)
    above = axes.get_xaxis_transform()  # levels across, a share of the axes' height upwards
    marks: dict[str, Any] = {"marker": "v", "markersize": 5, "markeredgewidth": 0, "linestyle": "none", "color": LEVEL}
    axes.plot(levels, [1.0] * len(levels), transform=above, clip_on=False, **marks)


def _use_logarithm(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at the powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def place_in_codebook(values: Tensor, levels: Tensor) -> Tensor:
    """Where values [G, N] lie among the levels [G, M] of their row: level m is at m, linear between and beyond."""
    below = (torch.searchsorted(levels.contiguous(), values.contiguous()) - 1).clamp(0, levels.shape[1] - 2)
    start, end = levels.gather(1, below), levels.gather(1, below + 1)
    return below + (values - start) / (end - start)
