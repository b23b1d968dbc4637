"""MNIST accuracy of a perceptron: one call of bqnn.fit with its defaults, against its three phases written by hand.

    python -m bench.accuracy_mlp [--seeds 3] [--update]

The loop by hand is that of examples/own_loop.py, with public functions alone. Both begin with the same network, train
for 20 epochs on all 60,000 training images, and draw their batches from the same seed; a step rounds differently, so
that they are two trainings. The test images are looked at once, by the trained network. The exit status is 1 where the
two means are more than 0.1 points apart. Some minutes on one core; --update writes bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import bqnn
from bench.kept import save_table
from bench.machine import RESULTS, ROOT
from bqnn.data.sources import Split, read_torchvision
from examples.own_loop import three_phases

TABLE = RESULTS / "accuracy_mlp.json"
BATCH = 128
LIMIT = 0.1
"""Points of test error, in percent, that lie between the means at most."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def as_vectors(split: Split) -> tuple[Tensor, Tensor]:
    """Images as [N, pixels] in 0..1, and labels."""
    return split.images.flatten(1).float() / 255, split.labels


def loader_of(inputs: Tensor, labels: Tensor) -> DataLoader[Any]:
    """Batches in a new order every epoch, taken of the tensors at once: image by image takes longer than a step."""
    data = TensorDataset(inputs, labels)
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=False), batch_size=None)


WAYS: dict[str, Callable[[nn.Module, DataLoader[Any], int], nn.Module]] = {
    "fit": lambda net, loader, seed: bqnn.fit(net, loader, seed=seed).net,
    "by hand": lambda net, loader, seed: three_phases(net, loader),
}


def run(way: str, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Trains a network; its test error in percent, and what the report says."""
    torch.manual_seed(seed)
    net, started = network(), time.perf_counter()
    torch.manual_seed(seed)
    net = WAYS[way](net, loader_of(*train), seed)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error = 100.0 * (net(test[0]).argmax(1) != test[1]).float().mean().item()
    return {"seed": seed, "test_error": error, "near_share": bqnn.report(net).near_share, "seconds": seconds}


def gap(table: dict[str, list[dict[str, Any]]]) -> float:
    """How far the means of the two ways lie apart, in points of test error."""
    first, second = (statistics.mean(run["test_error"] for run in runs) for runs in table.values())
    return abs(first - second)


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """A Markdown table of the runs of each way: test errors, seed by seed, and the smallest share of near means."""
    yield "| 784-256-256-10, M = 3, 20 epochs | test error %, seed by seed | mean | near % |"
    yield "|---|---|---|---|"
    names = {"fit": "`bqnn.fit` with its defaults", "by hand": "its three phases by hand"}
    for way, runs in found.items():
        errors, near = [run["test_error"] for run in runs], 100 * min(run["near_share"] for run in runs)
        each = ", ".join(f"{error:.2f}" for error in errors)
        yield f"| {names[way]} | {each} | {statistics.fmean(errors):.2f} | {near:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--update", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = read_torchvision("mnist", args.data, download=False)
    train, test = as_vectors(source.train), as_vectors(source.test)
    table: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way, runs in table.items():
            runs.append(run(way, seed, train, test))
            found = runs[-1]
            print(f"{way:<8} seed {seed}  test error {found['test_error']:.2f} %  {found['seconds']:.0f} s", flush=True)
    apart = gap(table)
    print(f"the means are {apart:.3f} points apart, at most {LIMIT}")
    if args.update:
        save_table(TABLE, table=table)
    sys.exit(0 if apart <= LIMIT else 1)


if __name__ == "__main__":
    main()
