"""What `bqnn eval` and `bqnn predict` are asked about: a run or a file, of a network or an ensemble."""

from __future__ import annotations

from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import nn

from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import network
from bqnn.files.metadata import Metadata
from bqnn.lab.ensemble import load_ensemble_run
from bqnn.lab.precision import autocast
from bqnn.lab.runs import Run, load_metadata, load_network, load_run
from bqnn.packed.weight import PackedWeight


class Opened(NamedTuple):
    """A network that is there to be asked."""

    net: nn.Module
    name: str
    """What kind of network it is."""
    metadata: Metadata
    runs: list[Run]
    """Whose networks these are; none for a file."""

    def computing(self, device: str) -> AbstractContextManager[object]:
        """The dtype to compute in: a run has that which it was trained in, a file its own precision."""
        return autocast(self.runs[0].recipe, device) if self.runs else nullcontext()


def open_network(options: Namespace, device: str) -> Opened:
    """The network of ``options.path``, on ``device``.

    Args:
        options: of the command: path, precision and data_root.
        device: as --device has it.

    Raises:
        ValueError, OSError: it can not be read, or an option is not for it.
    """
    path: Path = options.path
    found = _run(path, options) if path.is_dir() else _file(path, options.precision, device)
    found.net.to(device)
    return found


def _run(path: Path, options: Namespace) -> Opened:
    if options.precision != "fp32":
        raise ValueError("--precision is for a packed file; a run has its own")
    ensemble = load_ensemble_run(path)
    runs = [load_run(path)] if ensemble is None else ensemble.runs()
    net = load_network(runs[0]) if ensemble is None else ensemble.load()
    name = "quantized" if runs[0].recipe.method == "bayes" else "full precision"
    return Opened(net, name, load_metadata(runs[0], options.data_root), runs)


def _file(path: Path, precision: str, device: str) -> Opened:
    content = network.info(path)
    compiled, metadata = content["compiled"], content["metadata"]
    if compiled is not None and (device != "cpu" or precision != "fp32"):
        raise ValueError(f"--device and --precision are not for {path}, a compiled network with its own")
    if compiled is None and content["factory"] is None:
        raise ValueError(
            f"{path} has a network of somebody's own, whose code is not in the file: load it in Python, with "
            "bqnn.load(path, model=...), or save it compiled, which needs no code"
        )
    net = network.load(path, precision=precision)
    if isinstance(net, CompiledNetwork):
        return Opened(net, f"compiled, {compiled}", metadata, [])
    packed = any(isinstance(module, PackedWeight) for module in net.modules())
    return Opened(net, "packed" if packed else "quantized", metadata, [])
