"""What each claim of the method is worth on LeNet-5 and MNIST: differences of paired runs, with an interval.

    python -m bench.claims_lenet5 --out runs/claims [--seeds 0 1 2 3 4] [--save]

Of every seed all networks begin with one full-precision trunk, see the same images in the same order and train as many
epochs, half of those of the recipe lenet5-mnist. They differ in one thing at a time: levels that are free, or kept
symmetric about 0 (after each step the nearest such ones); a partition half-way between the levels, or learned; M; and
the prior, each at the weight of its divergence that has the smallest NLL on the validation images, all seeds together.
What is compared is the quantized network, Q of the means, on the test images, which are looked at once: error, NLL, and
NLL under Gaussian noise of the deviation 1 of a standardised pixel. Runs are folders under --out, and go on where they
were stopped.

A difference is the second network's less the first's, so that one below 0 is in favour of the second; the interval is
Student's, 95 %, over the seeds. Where it has 0 inside, the verdict is that nothing was shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from bench.kept import kept, save_table
from bench.machine import RESULTS
from bench.uncertainty_lenet5 import MIXTURE, MNIST, NOISE, inputs_of, train
from bqnn.bayes.layers import bayes_layers
from bqnn.core.codebook import raw_from_levels
from bqnn.data.splits import Splits
from bqnn.lab.evaluate import evaluate, find_split
from bqnn.lab.folder import WEIGHTS
from bqnn.lab.train import Trainer

TABLE = RESULTS / "claims_lenet5.json"
BASE = replace(MNIST, pretrain_epochs=3, deterministic_epochs=5, epochs=2)
LEVELS = (2, 3, 4)
KL_WEIGHTS = (0.1, 0.3, 1.0)
PRIORS: dict[str, dict[str, Any]] = {
    "spike-and-slab": {},
    "mixture": {name: getattr(MIXTURE, name) for name in ("prior", "estimator", "start_sigma", "variance_lr")}
    | {"spike_width": MIXTURE.spike_width},
    "Gaussian": {"prior": "gaussian"},
}
METRICS = {"error": "error, points", "nll": "NLL", "noisy_nll": "NLL under noise"}
CONFIDENCE = 0.95

Row = dict[str, Any]


class Network(NamedTuple):
    """A network of a seed: what its recipe changes, and whether its levels are kept symmetric."""

    changes: dict[str, Any]
    symmetric: bool = False


def weighted(prior: str, weight: float) -> str:
    """The name of the network with M = 3 and such a prior; the recipe's own is among those of each M."""
    return "M = 3, free" if (prior, weight) == ("spike-and-slab", 1.0) else f"{prior}, {weight:g}"


NETWORKS = {
    **{
        weighted(prior, weight): Network({**changes, "kl_weight": weight})
        for prior, changes in PRIORS.items()
        for weight in KL_WEIGHTS
    },
    **{f"M = {m}, free": Network({"num_levels": m}) for m in LEVELS},
    **{f"M = {m}, symmetric": Network({"num_levels": m}, symmetric=True) for m in LEVELS},
    **{f"M = {m}, learned": Network({"num_levels": m, "partition": "learned"}) for m in LEVELS},
}


class SymmetricTrainer(Trainer):
    """Takes the levels, before each step and after the last, to the nearest ones that are symmetric about 0."""

    def _batches(self, progress: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super()._batches(progress):
            make_symmetric_(self.net)
            yield batch
        make_symmetric_(self.net)


@torch.no_grad()
def make_symmetric_(net: nn.Module) -> None:
    for layer in bayes_layers(net).values():
        levels = layer.levels
        layer.raw_levels.copy_(raw_from_levels((levels - levels.flip(1)) / 2, layer.level_scale))


def row_of(name: str, seed: int, out: Path, data_root: Path) -> Row:
    """What a network does on the validation and test images; trained, and tested, unless that has been done."""
    folder = out / f"seed-{seed}" / name.replace(" ", "")
    row: Row = kept(folder / "row.json", lambda: _made_row(name, seed, folder, data_root))
    return row


def _made_row(name: str, seed: int, folder: Path, data_root: Path) -> Row:
    (changes, symmetric), base = NETWORKS[name], replace(BASE, seed=seed)
    kind = SymmetricTrainer if symmetric else Trainer
    recipe = replace(base, **changes)
    trunk = train(replace(base, method="fpnn", deterministic_epochs=0, epochs=0), folder.parent / "trunk", data_root)
    # Networks that differ in the prior alone have the deterministic phase in common, too.
    first = replace(base, num_levels=recipe.num_levels, partition=recipe.partition, epochs=0)
    shared = folder.parent / f"quantized-{first.num_levels}-{first.partition}{'-symmetric' * symmetric}"
    start = train(first, shared, data_root, trunk.folder / WEIGHTS, kind)
    trainer = train(recipe, folder, data_root, start.folder / WEIGHTS, kind)
    net, data = trainer.net, trainer.data
    found = evaluate(net, data.test, data)
    return {
        "network": name,
        "seed": seed,
        "validation_nll": evaluate(net, data.validation, data).nll,
        "error": found.error,
        "nll": found.nll,
        "noisy_nll": _noisy_nll(net, data),
    }


@torch.no_grad()
def _noisy_nll(net: nn.Module, data: Splits) -> float:
    logits = torch.cat([net(x) for x in inputs_of(data, "test", NOISE)])
    return F.cross_entropy(logits, find_split(data, "test").labels).item()


class Claim(NamedTuple):
    """Two networks, and what is said of the second."""

    text: str
    first: str
    second: str


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for m in LEVELS:
        yield Claim(f"free levels for symmetric ones, M = {m}", f"M = {m}, symmetric", f"M = {m}, free")
    for m in LEVELS:
        yield Claim(f"a learned partition for the nearest level, M = {m}", f"M = {m}, free", f"M = {m}, learned")
    for m, more in pairwise(LEVELS):
        yield Claim(f"M = {more} for {m}", f"M = {m}, free", f"M = {more}, free")
    best = {prior: best_weight(rows, prior) for prior in PRIORS}
    for first, second in (("Gaussian", "spike-and-slab"), ("Gaussian", "mixture"), ("spike-and-slab", "mixture")):
        weights = f"weights {best[second]:g} and {best[first]:g}"
        names = (weighted(prior, best[prior]) for prior in (first, second))
        yield Claim(f"{second} for {first}, {weights}", *names)


def best_weight(rows: Sequence[Row], prior: str) -> float:
    """Of the divergence from a prior: the one of the smallest mean NLL on validation images."""

    def mean(weight: float) -> float:
        return fmean(row["validation_nll"] for row in rows if row["network"] == weighted(prior, weight))

    return min(KL_WEIGHTS, key=mean)


class Difference(NamedTuple):
    """Of paired numbers, the second ones less the first ones."""

    mean: float
    half: float
    """Half of the interval's width."""

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        each = [b - a for a, b in zip(first, second, strict=True)]
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(each) - 1))
        return cls(fmean(each), quantile * stdev(each) / len(each) ** 0.5)

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.half:
            return "nothing shown"
        return "better" if self.mean < 0 else "worse"


def differences(rows: Sequence[Row]) -> Iterator[tuple[Claim, dict[str, Difference]]]:
    """Each claim and its differences by metric."""
    by_name = {name: [row for row in rows if row["network"] == name] for name in NETWORKS}
    for claim in claims(rows):
        pair = by_name[claim.first], by_name[claim.second]
        yield claim, {key: Difference.of(*([row[key] for row in each] for each in pair)) for key in METRICS}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: a line a claim, its differences with their intervals, and verdicts."""
    yield "| in place of | " + " | ".join(METRICS.values()) + " |"
    yield "|---" * (1 + len(METRICS)) + "|"
    for claim, found in differences(rows):
        decimals = {"error": 2, "nll": 4, "noisy_nll": 3}
        cells = [f"{d.mean:+.{decimals[k]}f} ± {d.half:.{decimals[k]}f}, {d.verdict}" for k, d in found.items()]
        yield f"| {claim.text} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more")
    parser.add_argument("--save", action="store_true", help=f"write the rows to {TABLE.name}")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for name in NETWORKS:
            row = row_of(name, seed, arguments.out, arguments.data)
            rows.append(row)
            print(name, "  ".join(f"{key} {row[key]:.4g}" for key in row if key != "network"), flush=True)
    print("\n".join(["", *table(rows)]))
    if arguments.save:
        save_table(TABLE, rows=rows)


if __name__ == "__main__":
    main()
