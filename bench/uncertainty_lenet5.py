"""What the posterior of LeNet-5 on MNIST says: calibration, and robustness against noise, on images held out.

    python -m bench.uncertainty_lenet5 --out runs/uncertainty [--only default mixture] [--test] [--save]

Trains what is missing, one network after the other, M = 3 with every layer quantized, all from one full-precision
phase and for as many epochs; a run that is stopped goes on where it was. Then each network is tested on the validation
images, clean and with Gaussian noise of the deviation 1 of a standardised pixel, as it is (one sample) and, with a
posterior, as the mean of 16 networks with codes drawn once and BatchNorm statistics of their own. ``--test`` takes the
test images, which are for the end. T is the temperature of the least NLL on clean validation images: 1 is calibrated.
NLL and mutual information (MI) are in nats an image, error and ECE (15 bins) in percent. ``--save`` writes the table
to bench/results/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import RESULTS, describe_machine
from bqnn.bayes.predict import Prediction, of_draws
from bqnn.bayes.sample import sampled_networks
from bqnn.core.files import write_atomically
from bqnn.data.splits import Splits, batches, normalise
from bqnn.lab.evaluate import find_split
from bqnn.lab.metrics import expected_calibration_error
from bqnn.lab.recipe import LENET5_MNIST, Recipe
from bqnn.lab.train import Trainer

TABLE = RESULTS / "uncertainty_lenet5.json"
SAMPLES, SEED = 16, 0
NOISE = 1.0  # deviations of a standardised pixel
BATCH, CALIBRATION_BATCHES = 500, 20
TEMPERATURES = torch.logspace(-1.0, 1.0, 401, dtype=torch.float64)
FLOOR = 1e-30  # of a probability that float32 made 0

TRUNK = replace(LENET5_MNIST, method="fpnn", deterministic_epochs=0, epochs=0)
RECIPES = {
    "fpnn": replace(LENET5_MNIST, method="fpnn"),
    "deterministic": replace(LENET5_MNIST, estimator="deterministic"),
    "default": LENET5_MNIST,
    "mixture": replace(LENET5_MNIST, prior="mixture", estimator="sample"),
    "mixture-moment": replace(LENET5_MNIST, prior="mixture"),
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
    for images, _ in batches(find_split(data, split), BATCH):
        x = normalise(images, data.mean, data.std)
        yield x + noise * torch.randn(x.shape, generator=generator) if noise else x


@torch.no_grad()
def probabilities(net: nn.Module, data: Splits, split: str, noise: float) -> Tensor:
    return torch.cat([net(x).double().softmax(-1) for x in inputs_of(data, split, noise)])


def ask(trainer: Trainer, cases: list[tuple[str, float]], samples: int) -> list[Prediction]:
    """What a network, or ``samples`` networks out of its posterior, say of each case, a split and its noise."""
    networks: Any = [trainer.net]
    if samples > 1:
        drawn = torch.Generator().manual_seed(SEED)
        shuffled = batches(trainer.data.train, BATCH, drawn, shuffle=True)
        images = [images for images, _ in zip((each for each, _ in shuffled), range(CALIBRATION_BATCHES))]
        given = [normalise(each, trainer.data.mean, trainer.data.std) for each in images]
        networks = sampled_networks(trainer.net, samples, SEED, given)
    draws = [[probabilities(network, trainer.data, *case) for case in cases] for network in networks]
    return [of_draws(torch.stack(each)) for each in zip(*draws, strict=True)]


def nll_of(probs: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """In nats an image, of the distributions to the power of 1 / temperature."""
    logits = probs.clamp(min=FLOOR).log() / temperature
    return F.cross_entropy(logits, labels).item()


def best_temperature(probs: Tensor, labels: Tensor) -> float:
    return min(TEMPERATURES.tolist(), key=lambda each: nll_of(probs, labels, each))


def scores(prediction: Prediction, labels: Tensor) -> dict[str, float]:
    probs = prediction.probs
    return {
        "error": 100.0 * (probs.argmax(1) != labels).double().mean().item(),
        "nll": nll_of(probs, labels),
        "ece": 100.0 * expected_calibration_error(probs, labels),
        "mi": prediction.mutual_information.mean().item(),
    }


def rows_of(name: str, trainer: Trainer, split: str) -> Iterator[Row]:
    labels, held_out = find_split(trainer.data, split).labels, find_split(trainer.data, "validation").labels
    has_posterior = trainer.recipe.method == "bayes" and trainer.recipe.estimator != "deterministic"
    for samples in (1, SAMPLES) if has_posterior else (1,):
        cases = [("validation", 0.0), (split, 0.0), (split, NOISE)]
        validation, clean, noisy = ask(trainer, cases, samples)
        yield {
            "network": name,
            "samples": samples,
            "temperature": best_temperature(validation.probs, held_out),
            "clean": scores(clean, labels),
            "noise": scores(noisy, labels),
        }


def show(row: Row) -> str:
    parts = [f"{row['network']:<15}{row['samples']:>3} T {row['temperature']:.2f}"]
    for case in ("clean", "noise"):
        found = row[case]
        parts.append(
            f"{case}: error {found['error']:.2f} NLL {found['nll']:.4f} ECE {found['ece']:.2f} MI {found['mi']:.4f}"
        )
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
