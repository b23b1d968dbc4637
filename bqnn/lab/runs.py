"""Runs: the folders that training leaves, read again to be scored, packed, timed and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from bqnn import models
from bqnn.bayes.layers import bayes_layers
from bqnn.core.ensemble import Ensemble
from bqnn.core.files import open_regular, write_content
from bqnn.core.text import shown
from bqnn.data.splits import Splits, load_dataset
from bqnn.engine.pack import pack
from bqnn.files import network
from bqnn.files.metadata import Metadata, read_fields
from bqnn.files.skeleton import built_in
from bqnn.lab.checkpoint import read_checkpoint
from bqnn.lab.folder import (
    CHECKPOINT,
    DATA,
    MEMBERS,
    METADATA,
    METRICS,
    SPLITS,
    UNCERTAINTY,
    WEIGHTS,
    RunLock,
    read_metrics,
    read_recipe,
    with_added_fields,
)
from bqnn.lab.labels import metadata_of
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import quantize
from bqnn.packed.weight import PackedWeight

PRIOR_NAMES = {"spike_slab": "spike-and-slab", "gaussian": "Gaussian prior", "mixture": "mixture prior"}


@dataclass(frozen=True)
class Run:
    """What a run's metrics.json holds."""

    folder: Path
    recipe: Recipe
    history: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]  # by split, what `bqnn eval` found
    images: dict[str, int] = field(default_factory=dict)  # by split; empty where the run is older than this field

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
            if recipe.layer_levels:
                parts.append(recipe.layer_levels)
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
        several = f"; it has an ensemble, whose members are runs: {folder}/member-0 and so on"
        more = several if (Path(folder) / MEMBERS).exists() else ""
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {METRICS}{more}")
    return Run(Path(folder), *read_metrics(path, SPLITS))


def stored_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run in ``folder``: of its checkpoint, or of its metrics.json; None where it has neither.

    Raises:
        ValueError: the file is damaged; one line that names it.
    """
    if (folder / CHECKPOINT).exists():
        try:
            return read_recipe(read_checkpoint(folder / CHECKPOINT)["recipe"])
        except ValueError as error:
            if str(folder / CHECKPOINT) in str(error):
                raise
            raise ValueError(f"{folder / CHECKPOINT} is no checkpoint of a run: {error}") from error
    return load_run(folder).recipe if (folder / METRICS).exists() else None


def clear_run(folder: Path) -> None:
    """Removes what training and tests write into ``folder``, and nothing else."""
    for name in (CHECKPOINT, WEIGHTS, METRICS, *UNCERTAINTY.values()):
        (folder / name).unlink(missing_ok=True)


def load_factory(run: Run) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the run's built-in network, as bqnn.models.build takes them.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: its weights are not a file that training wrote, or of another recipe than its metrics.json.
    """
    name, arguments = _about_weights(run)["factory"]
    return name, arguments


def load_metadata(run: Run, data_root: str | Path) -> Metadata:
    """What a finished run knows of its images and classes; raises as :func:`load_factory` does.

    Runs of earlier versions do not have it: of these it is what the data set in ``data_root`` says, or, where that can
    not be read, sizes alone.
    """
    about = _about_weights(run)
    try:
        sizes = {name: about["factory"][1][name] for name in network.SIZES}
        data = read_fields(about[DATA]) if DATA in about else _data_of_recipe(run.recipe, data_root)
        return data.fitted(**sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run.folder / WEIGHTS} is not what bqnn train writes: {shown(str(error))}") from error


def _data_of_recipe(recipe: Recipe, data_root: str | Path) -> Metadata:
    try:
        return metadata_of(load_data(recipe, data_root))
    except (ValueError, OSError, ImportError):
        return Metadata()


def _about_weights(run: Run) -> dict[str, Any]:
    """What the metadata of the run's weights say; raises as :func:`load_factory` does."""
    path = run.folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{run.folder} has no {WEIGHTS} yet; end the run with bqnn train --resume")
    open_regular(path).close()
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
        recipe, (name, _) = about["recipe"], about["factory"]
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what bqnn train writes: {shown(str(error))}") from error
    known = isinstance(recipe, dict) and with_added_fields(recipe) == asdict(run.recipe)
    if not known or name != run.recipe.model:
        raise ValueError(f"{path} is of another recipe than {METRICS} beside it")
    return about


def load_network(run: Run) -> nn.Module:
    """The trained network of a finished run, not packed, in evaluation mode; raises as :func:`load_factory` does.

    It is made on the meta device and compared with the names, shapes and dtypes in the file before it takes memory.
    """
    factory, path = load_factory(run), run.folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            skeleton = built_in(factory, len(names))
            with torch.device("meta"):
                net = quantize(skeleton, run.recipe)
            state = net.state_dict()
            if others := sorted(set(state) ^ set(names)):
                raise ValueError(f"tensor {others[0]!r} is in one of the two alone")
            for name, target in state.items():
                if file.get_slice(name).get_shape() != list(target.shape):
                    raise ValueError(f"tensor {name!r} must have the shape {list(target.shape)}")
            # Copies: what safetensors gives may be the file itself, mapped into memory.
            tensors = {name: file.get_tensor(name).to(target.dtype, copy=True) for name, target in state.items()}
        net.load_state_dict(tensors, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its recipe: {shown(str(error))}") from error
    return net.eval()


def load_data(recipe: Recipe, data_root: str | Path, download: bool = False) -> Splits:
    """The data set of a run, split and normalised as the run had it; raises as load_dataset does."""
    return load_dataset(
        recipe.dataset, data_root, image_size=recipe.image_size, validation=recipe.validation, download=download
    )


def add_scores(run: Run, split: str, scores: Mapping[str, Any]) -> Run:
    """Writes ``scores`` into the run's metrics.json under the split's name, and returns the run with them.

    Raises:
        OSError: the file can not be written, or another process is writing the run.
    """
    path = run.folder / METRICS
    with RunLock(run.folder):
        found = {**load_run(run.folder).scores, split: dict(scores)}
        text = json.dumps({**json.loads(path.read_text()), **found}, indent=1)
        write_content(path, text)
    return replace(run, scores=found)


def save_packed(net: nn.Module, path: str | Path, metadata: Metadata | None = None) -> nn.Module:
    """Packs a trained Bayes network, or an ensemble of them, into a file, loads it again and returns that.

    ``metadata`` are those of :func:`bqnn.save`.

    Raises:
        ValueError: ``net`` has no Bayes layer, or a parameter that is not finite.
        RuntimeError: a layer of the file does not decode to the weight it was made of.
    """
    network.save(pack(net), path, metadata)
    model = net[0] if isinstance(net, Ensemble) else net
    packed = network.load(path, None if hasattr(model, "factory") else model)
    for name, layer in bayes_layers(net).items():
        twin = packed.get_submodule(name)
        if not isinstance(twin, PackedWeight) or not torch.equal(twin.decode(), layer.quantized_weight().float().cpu()):
            raise RuntimeError(f"layer {name!r} of {path} does not decode to the quantized weight")
    return packed


def fpnn_bytes(name: str, arguments: Mapping[str, Any]) -> int:
    """Bytes of the safetensors file of a built-in network at full precision."""
    return len(save(models.build(name, arguments).state_dict()))
