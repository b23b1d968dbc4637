"""autotune: measures which configuration of the Triton kernels is the fastest for the packed products of a network.

A configuration is the tile sizes, warps, stages and parts that a kernel is launched with. Without tuned ones a rule
chooses by rows and precision (bqnn/kernels/packed.json). What was measured can be saved as JSON, shipped, and loaded
where there is a card of the same architecture; it holds numbers and names, and is checked when it is read.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bqnn import dispatch
from bqnn.atomic import write_atomically
from bqnn.ops._triton import kernels
from bqnn.packed_layer import PackedLayer
from bqnn.speed import inputs_of_packed_layers

# A configuration takes the place of the rule's where it needs this share of its time or less.
CLEARLY_FASTER = 0.97
MOST_COPIES = 16  # of a layer's codes that take turns, so that none is in the second-level cache

_log = logging.getLogger("bqnn")

Timer = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


class Tuned(NamedTuple):
    """What is the fastest for one kind of launch; times in seconds."""

    launch: dict[str, Any]
    """Op, architecture, precision, bits of a code, codebooks, bytes of an activation; rows, channels and columns,
    rounded up to powers of two: what a configuration is looked up by."""
    config: dict[str, Any]
    seconds: float
    default_seconds: float
    """Of the rule's configuration."""


class Tuning(list[Tuned]):
    """The launches for which another configuration than the rule's is the faster one; printed as a table."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what :func:`load_configs`, and ``BQNN_CONFIGS`` in the environment, read.

        Raises:
            OSError: the file can not be written; what was at ``path`` is still there.
        """
        entries = [
            {**row.launch, "config": row.config, "seconds": row.seconds, "default_seconds": row.default_seconds}
            for row in self
        ]
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        text = f'{{\n "version": {kernels("configs").VERSION},\n "tuned": [\n  {lines}\n ]\n}}\n'
        write_atomically(os.path.realpath(path), lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def __str__(self) -> str:
        numbers = "".join(f"{name:>11}" for name in ("rows", "channels", "columns", "rule, us", "tuned, us"))
        lines = [f"{'op':<15}{'precision':<10}{numbers}"]
        for row in self:
            sizes = "".join(f"{row.launch[name]:>11}" for name in ("rows", "channels", "columns"))
            times = f"{1e6 * row.default_seconds:>11.1f}{1e6 * row.seconds:>11.1f}"
            config = " ".join(f"{name}={value}" for name, value in row.config.items())
            lines.append(f"{row.launch['op']:<15}{row.launch['precision']:<10}{sizes}{times}  {config}")
        return "\n".join(lines)


def autotune(net: nn.Module, *inputs: Tensor, timer: Timer | None = None) -> Tuning:
    """Tries, for every packed layer of ``net`` as it runs on each of ``inputs``, the configurations of Triton kernels.

    Each is first compared with what the rule's configuration computes, and left out where the two differ, where its
    registers would be spilled, or where it asks for more memory than a multiprocessor has. What is faster takes effect
    at once, in this process. Layers that another backend runs have nothing to tune: with the CUDA kernels, those of up
    to 16 rows. A configuration takes seconds to compile.

    Args:
        net: a network that bqnn.pack or bqnn.load made, on a GPU.
        inputs: what it is called with, each of a size that it will be called with.
        timer: seconds of a call; by default CUDA graphs are timed, over copies of a layer's codes that together are
            larger than the second-level cache.

    Returns:
        a :class:`Tuning`: ``print`` it, ``save`` it.

    Raises:
        ValueError: there are no inputs; ``net`` has no packed layer, or none that ran.
        bqnn.BackendError: there is no GPU and no ``timer``, or Triton can not run here.
    """
    if not inputs:
        raise ValueError("inputs must be one or more, got none")
    for x in inputs:
        if timer is None and not x.is_cuda:
            raise dispatch.BackendError(f"autotune needs a GPU to measure on, and its input is on {x.device}")
        usable, reason = dispatch.status("packed_linear", "triton", x.device.type)
        if not usable:
            raise dispatch.BackendError(f"autotune is for the Triton kernels, which can not run here: {reason}")
    found: dict[Any, Tuned | None] = {}
    with torch.inference_mode():
        for x in inputs:
            for layer, layer_input in inputs_of_packed_layers(net, x).items():
                _tune(layer, layer_input, timer or _graph_seconds, found)
    better = {launch: tuned for launch, tuned in found.items() if tuned is not None}
    kernels("configs").install({launch: tuned.config for launch, tuned in better.items()})
    return Tuning(better.values())


def load_configs(path: str | os.PathLike[str]) -> None:
    """Takes the configurations in a file that :meth:`Tuning.save` wrote, in this process, before those there were.

    ``BQNN_CONFIGS=path`` in the environment does so where a kernel is first launched. Configurations for other
    architectures and shapes than those that run are never looked at.

    Raises:
        bqnn.FormatError: the file is none of these; says which entry is wrong, and what is.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    configs = kernels("configs")
    configs.install(configs.read(path))


def _tune(layer: PackedLayer, x: Tensor, seconds: Timer, found: dict[Any, Tuned | None]) -> None:
    """Puts into ``found`` what is the fastest for the launch of the layer's product, None where that is the rule's."""
    configs, options = kernels("configs"), kernels("packed_linear")
    twin = copy.copy(layer)
    twin.execution = "packed"
    with configs.trial() as trial:
        expected = twin(x)
    if not trial.launches or trial.launches[0] in found:
        return
    (launch,) = trial.launches
    copies = _copies(twin, x)

    def run() -> None:
        for each in copies:
            each(x)

    with configs.trial():
        default = seconds(run) / len(copies)
    best: tuple[float, dict[str, Any]] = (CLEARLY_FASTER * default, {})
    for config in options.candidates(launch):
        with configs.trial(launch, config) as trial:
            try:
                y = twin(x)
            except options.LaunchError as error:
                _log.info("autotune: %s can not run with %s: %s", launch, config, error)
                continue
            if any(kernel.n_spills for kernel in trial.kernels):
                _log.info("autotune: %s spills registers with %s", launch, config)
            elif not _agree(y, expected, layer.precision):
                _log.warning("autotune: %s computes something else with %s", launch, config)
            else:
                best = min(best, (seconds(run) / len(copies), config), key=lambda pair: pair[0])
    found[launch] = Tuned(launch._asdict(), best[1], best[0], default) if best[1] else None


def _agree(y: Tensor, expected: Tensor, precision: str) -> bool:
    """Whether two results differ by no more than the order of summation and the rounding of the output explain."""
    if precision == "int8":
        return torch.equal(y, expected)
    allowed = 1e-5 + torch.finfo(y.dtype).eps
    return bool((y.double() - expected.double()).norm() <= allowed * expected.double().norm())


def _copies(layer: PackedLayer, x: Tensor) -> list[PackedLayer]:
    """The layer, and copies of it with layouts of their own."""
    layout = layer._layout_for(x)
    if layout is None or not x.is_cuda:
        return [layer]
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    count = max(1, min(MOST_COPIES, math.ceil(2 * cache / layout.nbytes)))
    copies = [copy.copy(layer) for _ in range(count)]
    for each in copies:
        each._layout = layout.clone()
    return copies


def _graph_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1e-3 * do_bench_cudagraph(call, return_mode="median")
