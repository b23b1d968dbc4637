"""write_html: runs beside each other in one HTML page that needs nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bqnn import models
from bqnn.bayes.layers import bayes_layers
from bqnn.core.timing import measure_side_by_side
from bqnn.engine.compile import compile
from bqnn.lab.compile_run import COMPILED
from bqnn.lab.runs import Run, fpnn_bytes, load_factory, load_network, save_packed
from bqnn.reports.report import Report, report
from bqnn.view.facts import made_here
from bqnn.view.layers import layers_part
from bqnn.view.page import write_page
from bqnn.view.parts import DASH, Table, legend
from bqnn.view.runs import data_facts, draw_history, recipes_table, scores_table
from bqnn.view.uncertainty import uncertainty_part

BATCH = 256  # images of the pass that is timed
FPNN_BITS = 32.0
COMPILED_ROW = "the same, compiled for"


class _Network(NamedTuple):
    """What the page says of the network of a finished run."""

    net: nn.Module
    factory: tuple[str, dict[str, Any]]
    packed: nn.Module | None  # None at full precision
    nbytes: int  # on disk
    fpnn_bytes: int
    codebooks: Report | None


def write_html(
    runs: Sequence[Run], path: str | os.PathLike[str], *, log_counts: bool = True, measure: bool = True
) -> None:
    """Writes a page with tables and figures of ``runs``: one file, no script, nothing fetched.

    Args:
        runs: what bqnn.lab.runs.load_run read; of a run that is not finished, errors and curves alone are shown.
        path: the HTML file.
        log_counts: a logarithmic axis for the counts of the histograms, on which spikes leave the rest visible.
        measure: time a forward pass of each network beside that of its full-precision network, on the CPU.

    Raises:
        ValueError: there is no run.
        FileNotFoundError, ValueError: the files of a run are not what training writes.
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    titles = _titles(runs)
    networks = [_load(run) if run.finished else None for run in runs]
    write_page(
        path,
        "runs.html",
        title=titles[0] if len(runs) == 1 else f"{len(runs)} runs",
        facts=[*data_facts(runs), *made_here()],
        recipes=recipes_table(runs, titles),
        test=scores_table(runs, titles, "test"),
        validation=scores_table(runs, titles, "validation"),
        sizes=_sizes(titles, networks, measure),
        threads=torch.get_num_threads() if measure else 0,
        batch=BATCH,
        compiled_row=COMPILED_ROW,
        legend=legend(enumerate(titles)),
        curves=draw_history(runs),
        uncertainty=uncertainty_part(runs, titles),
        networks=[
            {"title": title, "layers": layers_part(f"r{number}", network.net, network.codebooks, log_counts)}
            for number, (title, network) in enumerate(zip(titles, networks, strict=True))
            if network is not None and network.codebooks is not None
        ],
    )


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


def _sizes(titles: Sequence[str], networks: Sequence[_Network | None], measure: bool) -> Table:
    rows = []
    for title, network in zip(titles, networks, strict=True):
        if network is None:
            rows.append([title, *[DASH] * 5])
            continue
        bits = network.codebooks.bits if network.codebooks else FPNN_BITS
        size = [f"{bits:.2f}", f"{network.nbytes:,}", f"{network.fpnn_bytes / network.nbytes:.1f} ×"]
        times, *compiled = _times(network) if measure else [(DASH, DASH)]
        rows.append([title, *size, *times])
        rows += [[f"{COMPILED_ROW} {name}", *[DASH] * 3, *each] for name, each in zip(COMPILED, compiled)]
    head = ["run", "bits a weight", "bytes on disk", "smaller", "test time", "of the FPNN's"]
    return Table(head, rows, [0])


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
