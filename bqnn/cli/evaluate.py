"""What `bqnn eval` does: a run or a file, of a network or an ensemble, tested on a split of a data set."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from bqnn.cli.opened import Opened, open_network
from bqnn.cli.uncertainty import evaluate_uncertainty
from bqnn.core.ensemble import Stacked
from bqnn.core.timing import measure_side_by_side
from bqnn.data.image_folder import class_names, read_image_folder
from bqnn.data.splits import Split, Splits, load_dataset, normalise
from bqnn.lab.compile_run import load_compiled
from bqnn.lab.ensemble import recipe_in
from bqnn.lab.evaluate import find_split, score_ensemble, score_network
from bqnn.lab.folder import METRICS
from bqnn.lab.labels import as_taken, check_prepared, count_logits
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, add_scores, load_data
from bqnn.view.html import BATCH

WIDTH = 22  # of the names before scores


def evaluate(options: Namespace, device: str) -> None:
    """`bqnn eval`, on ``device``."""
    if options.output is not None and not options.uncertainty:
        raise ValueError("--output is for --uncertainty")
    path, opened = options.path, open_network(options, device)
    given, seed = _data_of_run(opened.runs, options) if opened.runs else _data_of_file(opened, options)
    data = as_taken(given, opened.metadata, count_logits(opened.net, opened.metadata, given))
    torch.manual_seed(options.seed)
    split = find_split(data, options.split)
    if options.uncertainty:
        with opened.computing(device):
            return evaluate_uncertainty(opened.net, data, opened.name, opened.runs, options)
    nets = {opened.name: opened.net}
    if opened.name == "packed":
        nets |= {f"compiled, {precision}": fast for precision, fast in load_compiled(path).items()}
    times = None if opened.runs or device != "cpu" else _times(nets, split, data)
    refresh = seed if options.refresh else None
    with opened.computing(device):
        scores = _score(opened.net, split, data, options.samples, refresh)
    what = f"{options.split} split" if options.data is None else "all"
    print(f"{path}: {what} of {data.name}, {scores['images']} images")
    _print_network(opened.name, scores)
    for name, net in list(nets.items())[1:]:
        found = _score(net, split, data)
        _print_scores(name, found.get("ensemble", found))
    if "sampled" in scores:
        _print_mean(f"mean of {scores['sampled']['samples']} samples", scores["sampled"])
    for run, own in zip(opened.runs, scores.get("networks", [scores])):
        add_scores(run, options.split, own)
    if times is not None:
        print(times)


def _data_of_run(runs: list[Run], options: Namespace) -> tuple[Splits, int]:
    """The data set that a run was trained on, and the seed that its training images are drawn with."""
    if options.dataset is not None or options.data is not None:
        raise ValueError("--dataset and --data are for a file; a run has its own data set")
    recipe = runs[0].recipe
    return load_data(recipe, options.data_root), recipe.seed


def _data_of_file(opened: Opened, options: Namespace) -> tuple[Splits, int]:
    """What a file is to be tested on, and a seed."""
    path, metadata, seed = options.path, opened.metadata, Recipe.seed
    if options.data is not None:
        return _folder(opened, options), seed
    if options.dataset is not None:
        data = load_dataset(options.dataset, options.data_root, image_size=metadata.image_size)
    elif (recipe := recipe_in(path.parent)) is not None:
        data, seed = load_data(recipe, options.data_root), recipe.seed
    else:
        raise ValueError(f"--dataset or --data must say what to test {path} on: there is no {METRICS} beside it")
    if metadata.mean is None:
        print(f"{path} does not say how images are normalised: as the training images of {data.name} are")
    return data, seed


def _folder(opened: Opened, options: Namespace) -> Splits:
    """All images of the folder --data as a test split."""
    path, metadata = options.data, opened.metadata
    if options.dataset is not None or options.split != "test" or options.refresh or options.uncertainty:
        raise ValueError(
            "--data is tested as a whole, and can't be given with --dataset, --split, --refresh, --uncertainty"
        )
    check_prepared(metadata, options.path)
    classes = class_names(path)
    found = Split(*read_image_folder(path, classes, metadata.image_size, complete=False))
    none = Split(found.images[:0], found.labels[:0])
    channels, size = found.images.shape[1:3]
    mean, std = metadata.mean or (), metadata.std or ()
    return Splits(str(path), none, none, found, tuple(classes), channels, size, mean, std)


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
