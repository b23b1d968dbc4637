"""What the posterior of LeNet-5 on MNIST says: calibration, and robustness against noise, on images held out.

    python -m bench.uncertainty_lenet5 --out runs/uncertainty [--only default mixture] [--test] [--save]

Trains what is missing, one network after the other, M = 3 with every layer quantized, all from one full-precision
phase and for as many epochs; a run that is stopped goes on where it was. Then each network is tested on the validation
images, clean and with Gaussian noise of the deviation 1 of a standardised pixel, as it is (one sample) and, with a
posterior, as the mean of 16 networks with codes drawn once and BatchNorm statistics of their own. ``--test`` takes the
test images, which are for the end. T is the temperature of the least NLL on clean validation images: 1 is calibrated.
NLL and mutual information (MI) are in nats an image, error and ECE (15 bins) in percent. ``--save`` writes the table
to bench/results/, with the scores of bqnn.lab.uncertainty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import RESULTS, describe_machine
from bqnn.core.files import write_atomically
from bqnn.data.splits import Splits, batches, normalise
from bqnn.lab.evaluate import EVAL_BATCH, find_split
from bqnn.lab.metrics import best_temperature
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import load_recipe
from bqnn.lab.train import Trainer
from bqnn.lab.uncertainty import ask, drawn_networks, scores

TABLE = RESULTS / "uncertainty_lenet5.json"
SAMPLES, SEED = 16, 0
NOISE = 1.0  # deviations of a standardised pixel

MNIST = load_recipe("lenet5-mnist")
TRUNK = replace(MNIST, method="fpnn", deterministic_epochs=0, epochs=0)
RECIPES = {
    "fpnn": replace(MNIST, method="fpnn"),
    "deterministic": replace(MNIST, estimator="deterministic"),
    "default": MNIST,
    "mixture": replace(MNIST, prior="mixture", estimator="sample"),
    "mixture-moment": replace(MNIST, prior="mixture"),
}

Row = dict[str, Any]


def train(name: str, recipe: Recipe, data_root: Path, out: Path, init: Path | None = None) -> Trainer:
    """The trainer of a finished run."""
    trainer = Trainer(recipe, out / name, data_root=data_root, init=init)
    trainer.resume()
    trainer.run(progress=False)
    return trainer


def inputs_of(data: Splits, split: str, noise: float) -> Iterator[Tensor]:
    """The standardised images of a split, with noise that is the same for all networks."""
    generator = torch.Generator().manual_seed(SEED)
    for images, _ in batches(find_split(data, split), EVAL_BATCH):
        x = normalise(images, data.mean, data.std)
        yield x + noise * torch.randn(x.shape, generator=generator) if noise else x


def rows_of(name: str, trainer: Trainer, split: str) -> Iterator[Row]:
    """A row of the network itself and, where it has a posterior, one of several networks drawn from it."""
    data = trainer.data
    labels, held_out = find_split(data, split).labels, find_split(data, "validation").labels
    has_posterior = trainer.recipe.method == "bayes" and trainer.recipe.estimator != "deterministic"
    for samples in (1, SAMPLES) if has_posterior else (1,):
        networks = drawn_networks(trainer.net, data, samples, SEED)
        temperature = best_temperature(ask(networks, inputs_of(data, "validation", 0.0), data).probs, held_out)
        row: Row = {"network": name, "samples": samples, "temperature": temperature}
        for case, noise in (("clean", 0.0), ("noise", NOISE)):
            row[case] = scores(ask(networks, inputs_of(data, split, noise), data), labels, temperature)
        yield row


def show(row: Row) -> str:
    parts = [f"{row['network']:<15}{row['samples']:>3} T {row['temperature']:.2f}"]
    for case in ("clean", "noise"):
        found = row[case]
        likelihood = f"error {found['error']:.2f} NLL {found['nll']:.4f} at T {found['scaled_nll']:.4f}"
        parts.append(f"{case}: {likelihood} ECE {100 * found['ece']:.2f} MI {found['mutual_information']:.4f}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NETWORK")
    parser.add_argument("--test", action="store_true", help="test images, in place of those held out")
    parser.add_argument("--save", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    split = "test" if arguments.test else "validation"
    train("trunk", TRUNK, arguments.data, arguments.out)
    rows: list[Row] = []
    for name in arguments.only:
        init = arguments.out / "trunk" / "model.safetensors"
        trainer = train(name, RECIPES[name], arguments.data, arguments.out, init)
        for row in rows_of(name, trainer, split):
            rows.append(row)
            print(show(row), flush=True)
    if arguments.save:
        recipes = {name: asdict(RECIPES[name]) for name in arguments.only}
        result = {"machine": describe_machine(), "split": split, "recipes": recipes, "rows": rows}
        write_atomically(TABLE, lambda path: Path(path).write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
