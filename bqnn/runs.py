"""Runs: the folders that training leaves, read again to be scored, packed, timed and shown."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bqnn import io, models
from bqnn.atomic import write_atomically
from bqnn.calibration import expected_calibration_error
from bqnn.data import Split, Splits, batches, load_dataset, normalise
from bqnn.evaluate import EVAL_BATCH, device_of, evaluate
from bqnn.layers import bayes_layers
from bqnn.pack import pack
from bqnn.packed_layer import PackedLayer
from bqnn.predict import predict
from bqnn.recipe import Recipe
from bqnn.train import CHECKPOINT, METADATA, METRICS, SPLITS, WEIGHTS, quantize

PRIOR_NAMES = {"spike_slab": "spike-and-slab", "gaussian": "Gaussian prior"}
TIMING_REPEATS = 15
PROBABILITY_FLOOR = 1e-30  # of a mean over samples: a probability that float32 made 0 is not an infinite loss


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


def find_split(data: Splits, name: str) -> Split:
    """The split "test" or "validation"; raises ValueError where it is empty."""
    split: Split = getattr(data, name)
    if not len(split):
        raise ValueError(f"the {name} split of {data.name} is empty")
    return split


def score_network(net: nn.Module, split: Split, data: Splits, samples: int = 1) -> dict[str, Any]:
    """Error (percent), NLL (nats an image) and expected calibration error (0 to 1) of a network on a split.

    ``samples`` above 1 adds, under "sampled", the same of the mean over that many posterior samples, with the means of
    the predictive entropy and of the mutual information, in nats.

    Raises:
        ValueError: samples < 1, or more than 1 of a network without a posterior.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    score = evaluate(net, split, data)
    result: dict[str, Any] = {
        "images": len(split),
        "error": score.error,
        "nll": score.nll,
        "ece": expected_calibration_error(score.logits.softmax(1), split.labels),
    }
    if samples > 1:
        result["sampled"] = _sampled(net, split, data, samples)
    return result


def _sampled(net: nn.Module, split: Split, data: Splits, samples: int) -> dict[str, Any]:
    device = device_of(net)
    parts = [
        [part.cpu() for part in predict(net, normalise(images, data.mean, data.std).to(device), samples)]
        for images, _ in batches(split, EVAL_BATCH)
    ]
    probs, entropy, information = (torch.cat(column) for column in zip(*parts, strict=True))
    return {
        "samples": samples,
        "error": 100.0 * (probs.argmax(1) != split.labels).double().mean().item(),
        "nll": F.nll_loss(probs.double().clamp(min=PROBABILITY_FLOOR).log(), split.labels).item(),
        "ece": expected_calibration_error(probs, split.labels),
        "entropy": entropy.mean().item(),
        "mutual_information": information.mean().item(),
    }


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
    io.save(pack(net), path)
    packed = io.load(path, None if hasattr(net, "factory") else net)
    for name, layer in bayes_layers(net).items():
        twin = packed.get_submodule(name)
        if not isinstance(twin, PackedLayer) or not torch.equal(twin.decode(), layer.quantized_weight().float().cpu()):
            raise RuntimeError(f"layer {name!r} of {path} does not decode to the quantized weight")
    return packed


def fpnn_bytes(name: str, arguments: Mapping[str, Any]) -> int:
    """Bytes of the safetensors file of a built-in network at full precision."""
    return len(save(models.build(name, arguments).state_dict()))


def measure_side_by_side(
    nets: Sequence[Callable[[Tensor], Tensor]], x: Tensor, repeats: int = TIMING_REPEATS
) -> list[float]:
    """The median seconds of each network's forward pass on ``x``, on the CPU.

    The networks take turns, so that what else the machine does falls on all of them alike; two rounds go before, for
    what is done once.
    """
    times: list[list[float]] = [[] for _ in nets]
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for net, row in zip(nets, times, strict=True):
                started = time.perf_counter()
                net(x)
                row.append(time.perf_counter() - started)
    return [statistics.median(row[2:]) for row in times]
