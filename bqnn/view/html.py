"""write_html: runs beside each other in one HTML page that needs nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bqnn import models
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import bayes_layers
from bqnn.core import codebook
from bqnn.core.files import write_atomically
from bqnn.core.quantizer import look_up
from bqnn.core.timing import measure_side_by_side
from bqnn.engine.compile import compile
from bqnn.lab.compile_run import COMPILED
from bqnn.lab.runs import Run, fpnn_bytes, load_factory, load_network, save_packed
from bqnn.reports.report import LayerReport, Report, report
from bqnn.view.figures import Curve, draw_curves, draw_means
from bqnn.view.parts import DASH, legend, table
from bqnn.view.uncertainty import uncertainty_section

BATCH = 256  # images of the pass that is timed
FPNN_BITS = 32.0
COMPILED_ROW = "the same, compiled for"

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5d5d5, #444); --soft: light-dark(#666, #aaa); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #16181b); color: light-dark(#1a1a1a, #e4e4e4); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, figcaption { color: var(--soft); max-width: 48rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .text { text-align: left; }
td:first-child { white-space: normal; }
thead th { font-weight: 600; vertical-align: bottom; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.figures svg { width: 100%; height: auto; font-family: system-ui, sans-serif; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; margin: .5rem 0 1rem; padding: 0; list-style: none; }
.legend svg { width: 2rem; height: .7rem; margin-right: .4rem; }
"""


class _Network(NamedTuple):
    """What the page says of the network of a finished run."""

    net: nn.Module
    factory: tuple[str, dict[str, Any]]
    packed: nn.Module | None  # None at full precision
    nbytes: int  # on disk
    fpnn_bytes: int
    codebooks: Report | None


def write_html(runs: Sequence[Run], path: str | Path, *, log_counts: bool = True, measure: bool = True) -> None:
    """Writes a page with tables and figures of ``runs``: one file, no script, nothing fetched.

    Args:
        runs: what bqnn.lab.runs.load_run read; of a run that is not finished, only the curves are shown.
        path: the HTML file.
        log_counts: a logarithmic axis for the counts of the histograms, on which spikes leave the rest visible.
        measure: time a forward pass of each network beside that of its full-precision network, on the CPU.

    Raises:
        ValueError: there is no run.
        FileNotFoundError, ValueError: the files of a run are not what training writes.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    titles = _titles(runs)
    networks = [_load(run) if run.finished else None for run in runs]
    parts = ["<h1>Bayesian M-ary quantized networks</h1>", _summary(runs, titles, networks, measure)]
    parts += _curves(runs, titles)
    parts += uncertainty_section(runs, titles)
    for number, (title, network) in enumerate(zip(titles, networks, strict=True)):
        if network is not None and network.codebooks is not None:
            parts += _layers(number, title, network.net, network.codebooks, log_counts)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>bqnn: {escape(titles[0])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    write_atomically(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))


def _titles(runs: Sequence[Run]) -> list[str]:
    """The runs' titles; where two are the same, with the folder."""
    titles = [run.title for run in runs]
    return [
        f"{title} ({run.folder})" if titles.count(title) > 1 else title for run, title in zip(runs, titles, strict=True)
    ]


def _load(run: Run) -> _Network:
    net, factory = load_network(run), load_factory(run)
    dense = fpnn_bytes(*factory)
    if not bayes_layers(net):
        return _Network(net, factory, None, dense, dense, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        packed = save_packed(net, file)
        return _Network(net, factory, packed, file.stat().st_size, dense, report(net))


def _summary(runs: Sequence[Run], titles: Sequence[str], networks: Sequence[_Network | None], measure: bool) -> str:
    rows = []
    for run, title, network in zip(runs, titles, networks, strict=True):
        row = [title, *_accuracy(run)]
        if network is None:
            rows.append([*row, *[DASH] * 5])
            continue
        bits = network.codebooks.bits if network.codebooks else FPNN_BITS
        row += [f"{bits:.2f}", f"{network.nbytes:,}", f"{network.fpnn_bytes / network.nbytes:.1f} ×"]
        times, *compiled = _times(network) if measure else [(DASH, DASH)]
        rows.append([*row, *times])
        rows += [[f"{COMPILED_ROW} {name}", *[DASH] * 5, *each] for name, each in zip(COMPILED, compiled)]
    head = ["run", "accuracy", "split", "bits a weight", "bytes on disk", "smaller", "test time", "of the FPNN's"]
    time = "not measured."
    if measure:
        threads = torch.get_num_threads()
        time = (
            f"the median forward pass of a batch of {BATCH}, in turns with the full-precision network, on the CPU of "
            f"the machine that made this page ({threads} thread{'s' * (threads > 1)}). Rows “{COMPILED_ROW}”: "
            "the packed network of the row above after bqnn.compile; the scales of int8 are made of the random images "
            "that are timed, which changes no time."
        )
    note = (
        "<p>Bits a weight: codes as packed, without codebooks. Bytes on disk: of the packed file, or of the weights at "
        f"full precision; smaller: than those. Test time: {time}</p>"
    )
    return table(head, rows, [0, 2]) + note


def _accuracy(run: Run) -> tuple[str, str]:
    """Accuracy and the split it is of: the test split where `bqnn eval` was there, else the last validation."""
    if "test" in run.scores:
        return f"{100 - run.scores['test']['error']:.2f} %", "test"
    if run.history and run.history[-1]["validation_error"] is not None:
        return f"{100 - run.history[-1]['validation_error']:.2f} %", "validation"
    return DASH, DASH


def _times(network: _Network) -> list[tuple[str, str]]:
    """Time, and share of the full-precision network's: of the run's network, then of those compiled of a packed one."""
    name, arguments = network.factory
    channels, size = arguments["in_channels"], arguments["image_size"]
    x = torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))
    if network.packed is None:
        _, seconds = measure_side_by_side([network.net, network.net], x)
        return [(f"{1e3 * seconds:.2f} ms", "1")]
    nets = [network.packed]
    for precision in COMPILED:
        nets.append(compile(network.packed, x, precision=precision, calibration=[x] if precision == "int8" else None))
    dense, *times = measure_side_by_side([models.build(name, arguments).eval(), *nets], x)
    return [(f"{1e3 * seconds:.2f} ms", f"{seconds / dense:.2f}") for seconds in times]


def _curves(runs: Sequence[Run], titles: Sequence[str]) -> list[str]:
    def collect(value: Callable[[dict[str, Any]], float | None]) -> list[Curve]:
        curves = []
        for order, run in enumerate(runs):
            points = [(record["epoch"], y) for record in run.history if (y := value(record)) is not None]
            if points:
                curves.append(Curve([x for x, _ in points], [y for _, y in points], order))
        return curves

    def percent(key: str, rest: bool = False) -> Callable[[dict[str, Any]], float | None]:
        def value(record: dict[str, Any]) -> float | None:
            number: float | None = record[key]
            return None if number is None else 100 - number if rest else 100 * number

        return value

    marks = sorted({mark for run in runs for mark in _phase_starts(run)})
    loss = collect(percent("quantization_loss"))
    figures = (
        ("validation accuracy, %", collect(percent("validation_error", rest=True)), False),
        ("quantization loss, %", loss, all(min(curve.y) > 0 for curve in loss)),
        ("means near a level, %", collect(percent("near_share")), False),
    )
    drawn = [
        draw_curves(f"c{i}", title, curves, marks, logarithmic)
        for i, (title, curves, logarithmic) in enumerate(figures)
        if curves
    ]
    if not drawn:
        return []
    return [
        "<h2>Training</h2>",
        legend(enumerate(titles)),
        f'<div class="figures">{"".join(drawn)}</div>',
        "<p>Thin vertical lines: a phase of training begins. Quantization loss: the sum of (mean − its level)² over "
        "the sum of mean². Near a level: within a tenth of the gap between levels.</p>",
    ]


def _phase_starts(run: Run) -> list[float]:
    """Half-way between the last epoch of a phase and the first of the next, for every change of phase."""
    pairs = zip(run.history, run.history[1:], strict=False)
    return [before["epoch"] + 0.5 for before, after in pairs if before["phase"] != after["phase"]]


def _layers(number: int, title: str, net: nn.Module, codebooks: Report, log_counts: bool) -> list[str]:
    layers = bayes_layers(net)
    head = ("layer", "shape", "M", "bits", "bytes", "near", "loss", "dead", "σ in gaps", "levels (share of weights)")
    rows = [_layer_row(layer, layers[layer.name]) for layer in codebooks.layers]
    drawn = [
        draw_means(f"r{number}l{i}", name or "net", layer, log_counts) for i, (name, layer) in enumerate(layers.items())
    ]
    return [
        f"<h2>{escape(title)}</h2>",
        table(head, rows, [len(head) - 1]),
        "<p>σ in gaps: the posterior's standard deviation over the gap at its level, the median and, in brackets, the "
        "middle 80 % of the weights. Below: the means; solid lines are levels, dashed ones thresholds.</p>",
        f'<div class="figures">{"".join(drawn)}</div>',
    ]


@torch.no_grad()
def _layer_row(row: LayerReport, layer: BayesLayer) -> list[str]:
    sigma = DASH
    if layer.estimator != "deterministic":
        gaps = look_up(codebook.gaps(layer.levels), layer.codes())
        ordered = ((0.5 * layer.log_sigma2).exp() / gaps).flatten().sort().values
        low, middle, high = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.1, 0.5, 0.9))
        sigma = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    levels = f"{len(row.levels)} codebooks"
    if len(row.levels) == 1:
        shares = [count / max(1, row.weights) for count in row.occupancy]
        levels = ", ".join(f"{c:+.4f} ({100 * share:.0f} %)" for c, share in zip(row.levels[0], shares, strict=True))
    shape = "×".join(map(str, row.shape))
    near, loss = 100 * (row.near_share or 0.0), 100 * (row.quantization_loss or 0.0)
    return [
        row.name,
        shape,
        str(row.num_levels),
        f"{row.bits:.2f}",
        f"{row.nbytes:,}",
        f"{near:.1f} %",
        f"{loss:.3f} %",
        str(row.dead_levels),
        sigma,
        levels,
    ]
