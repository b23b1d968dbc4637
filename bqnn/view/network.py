"""write_report: one network of the user's in an HTML page."""

from __future__ import annotations

import os

from torch import nn

from bqnn.bayes.base import BayesLayer
from bqnn.core.check import check_flag, check_module, named
from bqnn.packed.weight import PackedWeight
from bqnn.reports.report import Report, report
from bqnn.view.facts import Fact, made_here
from bqnn.view.layers import layers_part
from bqnn.view.page import write_page


def write_report(
    net: nn.Module, path: str | os.PathLike[str], *, title: str | None = None, log_counts: bool = True
) -> None:
    """Writes a page on the quantized layers of any network: one HTML file, no script, nothing fetched.

    Of each layer it shows levels and how many weights have them, bits and bytes, and a figure: of a Bayes layer the
    histogram of its means beside levels and thresholds, of a packed one the weights by level. What is said is what
    :func:`bqnn.report` finds. It needs the extra "report".

    Args:
        net: a network with Bayes layers, packed ones, or both, on any device; it stays as it is.
        path: the file, which is replaced where there is one.
        title: of the page; by default the name of the network's class.
        log_counts: a logarithmic axis for the counts of the figures, on which a level that gathers most of the weights
            leaves the rest visible.

    Raises:
        TypeError: ``net`` is no module, or another argument of another type.
        ValueError: the network has no quantized layer, or a parameter is not finite.
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
        OSError: the file can not be written.
    """
    check_module("net", net)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {named(path)}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string or None, got {named(title)}")
    check_flag("log_counts", log_counts)
    found = report(net)
    facts = [*_sizes(net, found), *made_here()]
    layers = layers_part("", net, found, log_counts)
    write_page(path, "network.html", title=title or type(net).__name__, facts=facts, layers=layers)


def _sizes(net: nn.Module, found: Report) -> list[Fact]:
    """Weights, bits and bytes of the quantized layers, and what is left at full precision."""
    dense = 4 * found.weights
    modules = [module for module in net.modules() if not isinstance(module, (BayesLayer, PackedWeight))]
    others = {id(each): each.numel() for module in modules for each in module.parameters(recurse=False)}
    return [
        ("Quantized", f"{found.weights:,} weights in {len(found.layers)} layers, {found.bits:.2f} bits a weight"),
        ("Packed", f"{found.nbytes:,} bytes; in float32 {dense:,}, {dense / found.nbytes:.1f} times as many"),
        ("At full precision", f"{sum(others.values()):,} other parameters"),
    ]
