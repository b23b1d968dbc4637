"""What `bqnn eval` does: a run or a file, of a network or an ensemble, tested on a split of a data set."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from bqnn import models
from bqnn.cli.uncertainty import evaluate_uncertainty
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.timing import measure_side_by_side
from bqnn.data.splits import Split, Splits, load_dataset, normalise
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import network
from bqnn.lab.compile_run import load_compiled
from bqnn.lab.ensemble import load_ensemble_run, recipe_in
from bqnn.lab.evaluate import find_split, score_ensemble, score_network
from bqnn.lab.folder import METRICS
from bqnn.lab.precision import autocast
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, add_scores, load_data, load_network, load_run
from bqnn.view.html import BATCH

WIDTH = 22  # of the names before scores


class _Asked(NamedTuple):
    """What is to be tested, and on what."""

    net: nn.Module
    name: str
    data: Splits
    seed: int
    """Of the recipe, where there is one: what its training images are drawn with."""
    runs: list[Run]
    """Whose networks these are; none for a file."""


def evaluate(options: Namespace, device: str) -> None:
    """`bqnn eval`, on ``device``."""
    if options.output is not None and not options.uncertainty:
        raise ValueError("--output is for --uncertainty")
    path = options.path
    asked = _runs(options) if path.is_dir() else _file(options, device)
    torch.manual_seed(options.seed)
    split = find_split(asked.data, options.split)
    # A run is tested in the dtype that it was trained in; a file has a precision of its own.
    computing = autocast(asked.runs[0].recipe, device) if asked.runs else nullcontext()
    if options.uncertainty:
        with computing:
            return evaluate_uncertainty(asked.net.to(device), asked.data, asked.name, asked.runs, options)
    nets = {asked.name: asked.net}
    if asked.name == "packed":
        nets |= {f"compiled, {precision}": fast for precision, fast in load_compiled(path).items()}
    times = None if asked.runs else _times(nets, split, asked.data)
    refresh = asked.seed if options.refresh else None
    with computing:
        scores = _score(asked.net.to(device), split, asked.data, options.samples, refresh)
    print(f"{path}: {options.split} split of {asked.data.name}, {scores['images']} images")
    _print_network(asked.name, scores)
    for name, net in list(nets.items())[1:]:
        found = _score(net, split, asked.data)
        _print_scores(name, found.get("ensemble", found))
    if "sampled" in scores:
        _print_mean(f"mean of {scores['sampled']['samples']} samples", scores["sampled"])
    for run, own in zip(asked.runs, scores.get("networks", [scores])):
        add_scores(run, options.split, own)
    if times is not None:
        print(times)


def _runs(options: Namespace) -> _Asked:
    if options.dataset is not None or options.precision != "fp32":
        raise ValueError("--dataset and --precision are for a packed file; a run has its own")
    ensemble = load_ensemble_run(options.path)
    runs = [load_run(options.path)] if ensemble is None else ensemble.runs()
    net = load_network(runs[0]) if ensemble is None else ensemble.load()
    recipe = runs[0].recipe
    name = "quantized" if recipe.method == "bayes" else "full precision"
    return _Asked(net, name, load_data(recipe, options.data_root), recipe.seed, runs)


def _file(options: Namespace, device: str) -> _Asked:
    path = options.path
    net = network.load(path, precision=options.precision)
    compiled = isinstance(net, CompiledNetwork)
    if compiled and (device != "cpu" or options.precision != "fp32"):
        raise ValueError(f"--device and --precision are not for {path}, a compiled network with its own")
    seed = Recipe.seed
    if options.dataset is not None:
        data = load_dataset(options.dataset, options.data_root, image_size=_image_size(net))
    elif (recipe := recipe_in(path.parent)) is not None:
        data, seed = load_data(recipe, options.data_root), recipe.seed
    else:
        raise ValueError(f"--dataset must say what to test {path} on: there is no {METRICS} beside it")
    return _Asked(net, f"compiled, {net.precision}" if compiled else "packed", data, seed, [])


def _image_size(net: nn.Module) -> int | None:
    """The side in pixels of the images that a network of a file takes; None where the file does not say."""
    if isinstance(net, CompiledNetwork):
        return net.inputs[0].shape[-1]
    one = net[0] if isinstance(net, Ensemble) else net
    return one.factory[1]["image_size"] if isinstance(one, models.Network) else None


def _score(net: nn.Module, split: Split, data: Splits, samples: int = 1, refresh: int | None = None) -> dict[str, Any]:
    score: Any = score_ensemble if isinstance(net, Stacked) else score_network
    return score(net, split, data, samples, refresh)


def _print_network(name: str, scores: dict[str, Any]) -> None:
    """The scores of a network, or of those of an ensemble and of their mean."""
    if "ensemble" not in scores:
        _print_scores(name, scores)
        return
    for index, each in enumerate(scores["networks"]):
        _print_scores(f"{name} {index}", each)
    _print_mean(f"{name}, mean of {len(scores['networks'])}", scores["ensemble"])


def _print_mean(name: str, scores: dict[str, Any]) -> None:
    _print_scores(name, scores)
    information = f"mutual information {scores['mutual_information']:.4f} nats"
    print(f"{'':<{WIDTH}}entropy {scores['entropy']:.4f} nats  {information}")


def _times(nets: dict[str, nn.Module], split: Split, data: Splits) -> str:
    """A line of what a batch of the split takes in each of ``nets``, which are on the CPU."""
    x = normalise(split.images[:BATCH], data.mean, data.std)
    seconds = measure_side_by_side(list(nets.values()), x)
    times = "; ".join(f"{name} {1e3 * each:.2f} ms" for name, each in zip(nets, seconds, strict=True))
    return f"median time of {len(x)} images on the CPU: {times}"


def _print_scores(name: str, scores: dict[str, Any]) -> None:
    print(
        f"{name:<{WIDTH}}error {scores['error']:.2f} %  NLL {scores['nll']:.4f} nats  ECE {100 * scores['ece']:.2f} %"
    )
