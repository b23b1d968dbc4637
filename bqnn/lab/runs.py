"""Runs: the folders that training leaves, read again to be scored, packed, timed and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from bqnn import models
from bqnn.bayes.layers import bayes_layers
from bqnn.core.files import write_atomically
from bqnn.data.splits import Splits, load_dataset
from bqnn.engine.pack import pack
from bqnn.files import network
from bqnn.lab.folder import CHECKPOINT, METADATA, METRICS, SPLITS, WEIGHTS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import quantize
from bqnn.packed.base import PackedLayer

PRIOR_NAMES = {"spike_slab": "spike-and-slab", "gaussian": "Gaussian prior"}


@dataclass(frozen=True)
class Run:
    """What a run's metrics.json holds."""

    folder: Path
    recipe: Recipe
    history: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]  # by split, what `bqnn eval` found

    @property
    def finished(self) -> bool:
        """Whether the trained weights are there."""
        return (self.folder / WEIGHTS).exists()

    @property
    def title(self) -> str:
        """The run in a few words, made of its recipe."""
        recipe, default = self.recipe, Recipe()
        parts = ["FPNN"]
        if recipe.method == "bayes":
            parts = [f"M = {recipe.num_levels}", recipe.estimator]
            if recipe.estimator != "deterministic":
                parts.append(PRIOR_NAMES[recipe.prior])
            if recipe.partition != default.partition:
                parts.append(f"{recipe.partition} partition")
            if recipe.granularity != default.granularity:
                parts.append(f"a codebook a {recipe.granularity}")
        return ", ".join((*parts, f"{recipe.model} on {recipe.dataset}", f"seed {recipe.seed}"))


def load_run(folder: str | Path) -> Run:
    """Reads ``folder``/metrics.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what training writes.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {METRICS}")
    try:
        content = json.loads(path.read_text())
        recipe = Recipe(**content["recipe"])
        scores = {split: content[split] for split in SPLITS if split in content}
        return Run(Path(folder), recipe, list(content["history"]), scores)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what bqnn train writes: {error}") from error


def clear_run(folder: Path) -> None:
    """Removes what training writes into ``folder``, and nothing else."""
    for name in (CHECKPOINT, WEIGHTS, METRICS):
        (folder / name).unlink(missing_ok=True)


def load_factory(run: Run) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the run's built-in network, as bqnn.models.build takes them.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: its weights are not a file that training wrote, or of another recipe than its metrics.json.
    """
    path = run.folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{run.folder} has no {WEIGHTS} yet; end the run with bqnn train --resume")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA])
        recipe, (name, arguments) = metadata["recipe"], metadata["factory"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not what bqnn train writes: {error}") from error
    if recipe != asdict(run.recipe):
        raise ValueError(f"{path} is of another recipe than {METRICS} beside it")
    return name, arguments


def load_network(run: Run) -> nn.Module:
    """The trained network of a finished run, not packed, in evaluation mode; raises as :func:`load_factory` does."""
    net = quantize(models.build(*load_factory(run)), run.recipe)
    with safe_open(run.folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{run.folder / WEIGHTS} does not fit its recipe: {error}") from error
    return net.eval()


def load_data(recipe: Recipe, data_root: str | Path, download: bool = False) -> Splits:
    """The data set of a run, split and normalised as the run had it; raises as load_dataset does."""
    return load_dataset(
        recipe.dataset, data_root, image_size=recipe.image_size, validation=recipe.validation, download=download
    )


def add_scores(run: Run, split: str, scores: Mapping[str, Any]) -> Run:
    """Writes ``scores`` into the run's metrics.json under the split's name, and returns the run with them."""
    path = run.folder / METRICS
    content = {**json.loads(path.read_text()), split: dict(scores)}
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))
    return replace(run, scores={**run.scores, split: dict(scores)})


def save_packed(net: nn.Module, path: str | Path) -> nn.Module:
    """Packs a trained Bayes network into a file, loads it again and returns that.

    Raises:
        ValueError: ``net`` has no Bayes layer, or a parameter that is not finite.
        RuntimeError: a layer of the file does not decode to the weight it was made of.
    """
    network.save(pack(net), path)
    packed = network.load(path, None if hasattr(net, "factory") else net)
    for name, layer in bayes_layers(net).items():
        twin = packed.get_submodule(name)
        if not isinstance(twin, PackedLayer) or not torch.equal(twin.decode(), layer.quantized_weight().float().cpu()):
            raise RuntimeError(f"layer {name!r} of {path} does not decode to the quantized weight")
    return packed


def fpnn_bytes(name: str, arguments: Mapping[str, Any]) -> int:
    """Bytes of the safetensors file of a built-in network at full precision."""
    return len(save(models.build(name, arguments).state_dict()))
