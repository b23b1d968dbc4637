"""The figures of a report, as SVG that takes the colour of the text around it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bqnn.layers import BayesLayer, bayes_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by readers who do not see all hues, without those that vanish on white or black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 2", "2 2")
TEXT = "#010203"  # stands for the colour of the text; replaced in the SVG
BINS = 120
RANGE = 0.0005  # share of the means at either end that a histogram does not stretch to
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bqnn",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "legend.frameon": False,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
}
FONT = 'font: \\1px system-ui, "Helvetica Neue", Arial, sans-serif'
_numbers = itertools.count()


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of ``rows`` x ``columns`` axes, each ``width`` x ``height`` inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline <svg> element; names in it differ from those of every other figure of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", lambda m: f"font: {m[1]}px system-ui, sans-serif", text)
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"\s*\n\s*", "\n", text.replace(TEXT, "currentColor"))
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
