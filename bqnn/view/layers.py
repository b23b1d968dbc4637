"""The layers of a network on a page: a table, and a figure of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import bayes_layers
from bqnn.core import codebook
from bqnn.core.quantizer import look_up
from bqnn.reports.report import LayerReport, Report
from bqnn.view.figures import draw_means, draw_occupancy
from bqnn.view.parts import DASH, Table

HEAD = ("layer", "shape", "M", "bits", "bytes", "dead")
OF_MEANS = ("near", "loss", "σ in gaps")
LEVELS = "levels (share of weights)"


class LayersPart(NamedTuple):
    """What ``layers.html`` takes."""

    table: Table
    figures: list[str]
    has_means: bool
    """Whether a layer has a posterior, or means at least; packed ones have codes alone."""


def layers_part(key: str, net: nn.Module, found: Report, log_counts: bool) -> LayersPart:
    """The layers of ``net`` that are in its report; ``key`` makes the figures' ids unlike those of other networks."""
    layers = bayes_layers(net)
    rows, drawn = [], []
    for index, row in enumerate(found.layers):
        name, layer = row.name or "net", layers.get(row.name)
        of_means = [] if not layers else _of_means(row, layer)
        rows.append([name, *_of_codes(row), *of_means, _levels(row)])
        if layer is None:
            drawn.append(draw_occupancy(f"{key}l{index}", name, row.levels, row.occupancy, log_counts))
        else:
            drawn.append(draw_means(f"{key}l{index}", name, layer, log_counts))
    head = [*HEAD, *(OF_MEANS if layers else ()), LEVELS]
    return LayersPart(Table(head, rows, (0, len(head) - 1)), drawn, bool(layers))


def _of_codes(row: LayerReport) -> list[str]:
    shape = "×".join(map(str, row.shape))
    return [shape, str(row.num_levels), f"{row.bits:.2f}", f"{row.nbytes:,}", str(row.dead_levels)]


@torch.no_grad()
def _of_means(row: LayerReport, layer: BayesLayer | None) -> list[str]:
    if layer is None or row.near_share is None or row.quantization_loss is None:
        return [DASH] * len(OF_MEANS)
    sigma = DASH
    if layer.estimator != "deterministic":
        gaps = look_up(codebook.gaps(layer.levels), layer.codes())
        ordered = ((0.5 * layer.log_sigma2).exp() / gaps).flatten().sort().values
        low, middle, high = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.1, 0.5, 0.9))
        sigma = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return [f"{100 * row.near_share:.1f} %", f"{100 * row.quantization_loss:.3f} %", sigma]


def _levels(row: LayerReport) -> str:
    if len(row.levels) > 1:
        return f"{len(row.levels)} codebooks"
    shares = [count / max(1, row.weights) for count in row.occupancy]
    return ", ".join(
        f"{c:+.4f}\N{NO-BREAK SPACE}({100 * share:.0f}\N{NO-BREAK SPACE}%)"
        for c, share in zip(row.levels[0], shares, strict=True)
    )
