"""What `bqnn eval` does: a run or a file, tested on a split of a data set."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from torch import nn

from bqnn import models
from bqnn.core.timing import measure_side_by_side
from bqnn.data.splits import Split, Splits, load_dataset, normalise
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import network
from bqnn.lab import runs
from bqnn.lab.compile_run import load_compiled
from bqnn.lab.evaluate import find_split, score_network
from bqnn.lab.folder import METRICS
from bqnn.lab.recipe import Recipe
from bqnn.view.html import BATCH


class _Asked(NamedTuple):
    """What is to be tested, and on what."""

    net: nn.Module
    name: str
    data: Splits
    seed: int
    """Of the recipe, where there is one: what its training images are drawn with."""


def evaluate(options: Namespace, device: str) -> None:
    """`bqnn eval`, on ``device``."""
    path = options.path
    run = runs.load_run(path) if path.is_dir() else None
    asked = _run(run, options) if run is not None else _file(options, device)
    torch.manual_seed(options.seed)
    split = find_split(asked.data, options.split)
    nets = {asked.name: asked.net}
    if asked.name == "packed":
        nets |= {f"compiled, {precision}": fast for precision, fast in load_compiled(path).items()}
    times = None if run is not None else _times(nets, split, asked.data)
    refresh = asked.seed if options.refresh else None
    scores = score_network(asked.net.to(device), split, asked.data, options.samples, refresh)
    print(f"{path}: {options.split} split of {asked.data.name}, {scores['images']} images")
    for name, net in nets.items():
        _print_scores(name, scores if net is asked.net else score_network(net, split, asked.data))
    if "sampled" in scores:
        sampled = scores["sampled"]
        _print_scores(f"mean of {sampled['samples']} samples", sampled)
        information = f"mutual information {sampled['mutual_information']:.4f} nats"
        print(f"{'':<22}entropy {sampled['entropy']:.4f} nats  {information}")
    if run is not None:
        runs.add_scores(run, options.split, scores)
    if times is not None:
        print(times)


def _run(run: runs.Run, options: Namespace) -> _Asked:
    if options.dataset is not None or options.precision != "fp32":
        raise ValueError("--dataset and --precision are for a packed file; a run has its own")
    name = "quantized" if run.recipe.method == "bayes" else "full precision"
    data = runs.load_data(run.recipe, options.data_root)
    return _Asked(runs.load_network(run), name, data, run.recipe.seed)


def _file(options: Namespace, device: str) -> _Asked:
    path = options.path
    net, beside = network.load(path, precision=options.precision), path.parent / METRICS
    compiled = isinstance(net, CompiledNetwork)
    if compiled and (device != "cpu" or options.precision != "fp32"):
        raise ValueError(f"--device and --precision are not for {path}, a compiled network with its own")
    seed = Recipe.seed
    if options.dataset is not None:
        data = load_dataset(options.dataset, options.data_root, image_size=_image_size(net))
    elif beside.exists():
        recipe = runs.load_run(path.parent).recipe
        data, seed = runs.load_data(recipe, options.data_root), recipe.seed
    else:
        raise ValueError(f"--dataset must say what to test {path} on: there is no {METRICS} beside it")
    return _Asked(net, f"compiled, {net.precision}" if compiled else "packed", data, seed)


def _image_size(net: nn.Module) -> int | None:
    """The side in pixels of the images that a network of a file takes; None where the file does not say."""
    if isinstance(net, CompiledNetwork):
        return net.inputs[0].shape[-1]
    return net.factory[1]["image_size"] if isinstance(net, models.Network) else None


def _times(nets: dict[str, nn.Module], split: Split, data: Splits) -> str:
    """A line of what a batch of the split takes in each of ``nets``, which are on the CPU."""
    x = normalise(split.images[:BATCH], data.mean, data.std)
    seconds = measure_side_by_side(list(nets.values()), x)
    times = "; ".join(f"{name} {1e3 * each:.2f} ms" for name, each in zip(nets, seconds, strict=True))
    return f"median time of {len(x)} images on the CPU: {times}"


def _print_scores(name: str, scores: dict[str, Any]) -> None:
    print(f"{name:<22}error {scores['error']:.2f} %  NLL {scores['nll']:.4f} nats  ECE {100 * scores['ece']:.2f} %")
