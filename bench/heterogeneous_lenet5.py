"""LeNet-5 where data are few, mislabelled, unbalanced or corrupted: which network is best in each case.

    python -m bench.heterogeneous_lenet5 --out runs/heterogeneous [--seeds 0 1 2] [--save]

Each condition gives training images of MNIST, and a fifth as many held-out ones of the same kind, on which all choices
are made; the test images are whole, clean and balanced, and are looked at once. Labels are wrong with a chance, each
other class as likely; a long tail of 10 or 100 is how many times more images the first class has than the last, the
others in geometric steps between. The last condition has the networks of 10,000 images, and corrupted test images.

Every network takes the same number of steps, on batches of at most 128 images with the distortions of the recipe
lenet5-mnist, in the recipe's phases and rates:

- FPNN: at full precision, the weight decay and the round to stop at (of 20) chosen by the held-out images' NLL;
- FPNN, 4 narrow: the mean of four at full precision, as the first but so narrow that they have the four quantized
  networks' bytes together;
- deterministic: M = 3;
- mixture, 16: the mean of 16 networks drawn from the packed posterior with the prior "mixture", the weight of its
  divergence chosen by the held-out images' NLL;
- ensemble, 4: the mean of four deterministic networks from one trunk.

Rows are kept under --out; a condition of a seed is trained in one go.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kept import kept, save_table
from bench.machine import RESULTS
from bench.uncertainty_lenet5 import MIXTURE, MNIST, SAMPLES
from bqnn.bayes.batchnorm import refresh_batchnorm
from bqnn.core.ensemble import Ensemble
from bqnn.data.augment import augment
from bqnn.data.corruptions import CORRUPTIONS
from bqnn.data.splits import Split, Splits, batches, load_dataset, normalise
from bqnn.engine.pack import pack
from bqnn.lab.evaluate import EVAL_BATCH, evaluate, statistics_batches
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import quantize
from bqnn.lab.uncertainty import ask, corrupted, drawn_networks, mean_scores, scores
from bqnn.models import lenet5
from bqnn.training.epoch import Objective, train_epoch
from bqnn.training.phases import BAYES, DETERMINISTIC, FULL_PRECISION, make_optimizer

TABLE = RESULTS / "heterogeneous_lenet5.json"
STEPS = 40
"""Of a round, which stands in the place of an epoch of the recipe: 5,120 images."""
WEIGHT_DECAYS = (0.0, 0.05, 0.5)
KL_WEIGHTS = (1.0, 0.1, 0.01)
MEMBERS = 4
STRENGTH = 3
"""Of every corruption, of 1 to 5."""
CORRUPTED = "10,000 images, corrupted at test"
NARROW = (2, 5, 27, 20)
"""Channels and features of a network that has no more bytes than LeNet-5 packed at M = 3."""
METRICS = {"error": 2, "nll": 3}
"""What networks are compared by, and its decimals."""

Row = dict[str, Any]


class Condition(NamedTuple):
    """What the training images are like."""

    images: int
    wrong_labels: float = 0.0
    long_tail: float = 1.0


CONDITIONS = {
    "100 images": Condition(100),
    "1,000 images": Condition(1_000),
    "10,000 images": Condition(10_000),
    "20 % of labels wrong": Condition(10_000, wrong_labels=0.2),
    "40 % of labels wrong": Condition(10_000, wrong_labels=0.4),
    "long tail of 10": Condition(10_000, long_tail=10.0),
    "long tail of 100": Condition(10_000, long_tail=100.0),
}


def drawn_data(data: Splits, condition: Condition, seed: int) -> Splits:
    """``data`` with training and held-out images as ``condition`` has them; the test images stay."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)
    held_out = condition.images // 5
    parts = order[: condition.images], order[condition.images : condition.images + held_out]
    train, validation = (_changed(data.train, part, condition, data.num_classes, generator) for part in parts)
    return replace(data, train=train, validation=validation)


def _changed(split: Split, part: Tensor, condition: Condition, classes: int, generator: torch.Generator) -> Split:
    labels = split.labels[part]
    if condition.long_tail != 1.0:
        shares = condition.long_tail ** (-torch.arange(classes) / (classes - 1))
        of_class = F.one_hot(labels, classes)
        place = (of_class.cumsum(0) * of_class).sum(1)  # of an image among those of its class, from 1
        part = part[place <= (len(part) / classes * shares)[labels]]
        labels = split.labels[part]
    wrong = torch.rand(len(labels), generator=generator) < condition.wrong_labels
    other = torch.randint(1, classes, labels.shape, generator=generator)
    return Split(split.images[part], torch.where(wrong, (labels + other) % classes, labels))


def narrow_lenet5() -> nn.Module:
    """LeNet-5's layers with :data:`NARROW` channels and features."""
    first, second, third, fourth = NARROW
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=2, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5, bias=False), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(25 * second, third, bias=False), nn.BatchNorm1d(third), nn.ReLU()),
        *(nn.Linear(third, fourth, bias=False), nn.BatchNorm1d(fourth), nn.ReLU(), nn.Linear(fourth, 10)),
    )


class School:
    """Trains networks on the images of one condition and seed."""

    def __init__(self, data: Splits, seed: int) -> None:
        self.data, self.seed = data, seed

    def trained(
        self, net: nn.Module, phases: Sequence[int], recipe: Recipe, seed: int, stop: bool = False
    ) -> nn.Module:
        """``net`` after the phases of a recipe; with ``stop``, as it was after the round of the least held-out NLL."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        batch_size = min(recipe.batch_size, len(self.data.train))
        images = self._forever(batch_size, recipe, generator)
        objective = Objective(F.cross_entropy, len(self.data.train), recipe.kl_warmup, kl_weight=recipe.kl_weight)
        least, best = float("inf"), None
        for phase in phases:
            net = quantize(net, recipe, phase)
            _, rounds, lr = recipe.phases[phase]
            optimizer, scheduler = make_optimizer(net, phase, lr, rounds * STEPS, recipe.rates)
            for done in range(rounds):
                train_epoch(net, islice(images, STEPS), optimizer, scheduler, objective, done, STEPS)
                if stop and (nll := evaluate(net, self.data.validation, self.data).nll) < least:
                    least, best = nll, deepcopy(net.state_dict())
        if best is not None:
            net.load_state_dict(best)
        elif recipe.method == "bayes":
            refresh_batchnorm(net, statistics_batches(self.data, seed, torch.device("cpu")))
        return net.eval()

    def _forever(self, size: int, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.data
        while True:
            for images, labels in batches(data.train, size, generator, shuffle=True, drop_last=True):
                yield augment(normalise(images, data.mean, data.std), generator, recipe.augment), labels

    def held_out_nll(self, networks: Sequence[nn.Module]) -> float:
        prediction = ask(networks, self.data.validation.images.split(EVAL_BATCH), self.data)
        return scores(prediction, self.data.validation.labels, 1.0)["nll"]

    def fpnn(self) -> tuple[nn.Module, float]:
        """The tuned network, and its weight decay."""
        found = []
        for decay in WEIGHT_DECAYS:
            net = self._full_precision(lenet5, decay, self.seed)
            found.append((self.held_out_nll([net]), decay, net))
        _, decay, net = min(found, key=lambda each: each[0])
        return net, decay

    def narrow(self, decay: float) -> nn.Module:
        """The ensemble of narrow networks."""
        return Ensemble(self._full_precision(narrow_lenet5, decay, seed) for seed in self._seeds())

    def _full_precision(self, make: Callable[[], nn.Module], decay: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        recipe = replace(MNIST, method="fpnn", weight_decay=decay)
        return self.trained(make(), range(FULL_PRECISION, BAYES + 1), recipe, seed, stop=True)

    def quantized(self) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
        """The deterministic network, the ensemble of such, and the networks drawn of the mixture's posterior."""
        last = replace(MNIST, estimator="deterministic")
        torch.manual_seed(self.seed)
        trunk = self.trained(lenet5(), [FULL_PRECISION], replace(MNIST, method="fpnn"), self.seed)
        begun = [self.trained(deepcopy(trunk), [DETERMINISTIC], MNIST, seed) for seed in self._seeds()]
        start = deepcopy(begun[0].state_dict())
        members = [self.trained(net, [BAYES], last, seed) for net, seed in zip(begun, self._seeds(), strict=True)]
        found = []
        for weight in KL_WEIGHTS:
            recipe = replace(MIXTURE, kl_weight=weight)
            net = quantize(lenet5(), recipe, DETERMINISTIC)
            net.load_state_dict(start)
            packed = pack(self.trained(net, [BAYES], recipe, self.seed))
            networks = drawn_networks(packed, self.data, SAMPLES, 0)
            found.append((self.held_out_nll(networks), networks))
        return members[0], Ensemble(members), min(found, key=lambda each: each[0])[1]

    def _seeds(self) -> range:
        """Of the members of an ensemble; others for every seed of the run."""
        return range(MEMBERS * self.seed, MEMBERS * (self.seed + 1))


def rows_of(name: str, seed: int, out: Path, data: Splits) -> list[Row]:
    """Rows of every network for a condition and seed, with corrupted test images where the table has them; trained and
    tested, unless they are kept."""
    path = out / f"seed-{seed}" / f"{name.replace(' ', '-').replace('%', 'percent')}.json"
    rows: list[Row] = kept(path, lambda: _made_rows(name, seed, data))
    return rows


def _made_rows(name: str, seed: int, data: Splits) -> list[Row]:
    school = School(drawn_data(data, CONDITIONS[name], seed), seed)
    fpnn, decay = school.fpnn()
    deterministic, ensemble, mixture = school.quantized()
    networks = {
        "FPNN": [fpnn],
        "FPNN, 4 narrow": [school.narrow(decay)],
        "deterministic": [deterministic],
        "mixture, 16": mixture,
        "ensemble, 4": [ensemble],
    }
    rows = []
    for title, each in networks.items():
        start = {"network": title, "seed": seed}
        clean = scores(ask(each, data.test.images.split(EVAL_BATCH), data), data.test.labels, 1.0)
        rows.append({"condition": name, **start, **clean})
        if CORRUPTED.startswith(name):
            found = [
                scores(ask(each, corrupted(data.test, kind, STRENGTH), data), data.test.labels, 1.0)
                for kind in CORRUPTIONS
            ]
            rows.append({"condition": CORRUPTED, **start, **mean_scores(found)})
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: a line a condition, error (percent) and NLL (nats) of each network, means over the seeds. The
    least of each line is bold, with a star where it is the least in every seed; the last line counts the bold ones."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    wins = dict.fromkeys(networks, 0)
    yield "| error %, NLL | " + " | ".join(networks) + " |"
    yield "|---" * (1 + len(networks)) + "|"
    for condition in dict.fromkeys(row["condition"] for row in rows):
        here = [row for row in rows if row["condition"] == condition]
        cells: dict[str, list[str]] = {name: [] for name in networks}
        for metric, decimals in METRICS.items():
            values = {name: [row[metric] for row in here if row["network"] == name] for name in networks}
            best = min(networks, key=lambda name: fmean(values[name]))
            wins[best] += 1
            for name in networks:
                text = f"{fmean(values[name]):.{decimals}f}"
                cells[name].append(f"**{text}**{'*' * _always(values, best)}" if name == best else text)
        yield f"| {condition} | " + " | ".join(", ".join(cells[name]) for name in networks) + " |"
    yield "| least, of all cells | " + " | ".join(str(wins[name]) for name in networks) + " |"


def _always(values: Mapping[str, Sequence[float]], best: str) -> bool:
    """Whether one network has the least of every seed, of which there are several."""
    least = [min(of_seed) for of_seed in zip(*values.values(), strict=True)]
    return len(least) > 1 and list(values[best]) == least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true", help=f"write the rows to {TABLE.name}")
    arguments = parser.parse_args()
    data, rows = load_dataset("mnist", arguments.data, validation=0), []
    for seed in arguments.seeds:
        for name in CONDITIONS:
            for row in rows_of(name, seed, arguments.out, data):
                rows.append(row)
                found = f"error {row['error']:.2f} NLL {row['nll']:.4f} ECE {100 * row['ece']:.2f}"
                print(f"{row['condition']:<34}{row['network']:<16} seed {seed}  {found}", flush=True)
    print("\n".join(["", *table(rows)]))
    if arguments.save:
        save_table(TABLE, rows=rows)


if __name__ == "__main__":
    main()
