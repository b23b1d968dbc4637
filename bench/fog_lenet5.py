"""``python -m bench.fog_lenet5 --out runs/uncertainty``: what of fog it is that networks lose by, on validation images.

Takes the networks of ``python -m bench.uncertainty_lenet5 --out runs/uncertainty``. Fog makes images brighter, weakens
their contrast and adds clouds. A row a network gives the NLL, in nats, where each image has of its fog: all; its
contrast and clouds, with the brightness of the clean image; its clouds alone; its brightness alone; and its contrast
alone. Then how far the first layer's filters answer to constant light: |sum of weights| over their norm, the mean over
filters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from bench.uncertainty_lenet5 import CASES, SEED, train_network
from bqnn.data.splits import Splits
from bqnn.engine.pack import pack
from bqnn.lab.evaluate import EVAL_BATCH
from bqnn.lab.metrics import nll_of
from bqnn.lab.uncertainty import ask, corrupted, drawn_networks
from bqnn.packed.base import PackedLayer

STRENGTH = 5
KINDS = ("fog", "not its brightness", "its clouds", "its brightness", "its contrast")


def parts_of_fog(clean: Tensor, fog: Tensor) -> dict[str, Tensor]:
    """Images [B, C, H, W] in 0..1 by :data:`KINDS`; numbers may leave the range."""
    (mean, deviation), (fog_mean, fog_deviation) = (
        (x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)) for x in (clean, fog)
    )
    ratio = fog_deviation / deviation
    made = (
        fog,
        fog - fog_mean + mean,
        (fog - fog_mean) / ratio + mean,
        clean - mean + fog_mean,
        (clean - mean) * ratio + mean,
    )
    return dict(zip(KINDS, made))


def losses(net: nn.Module, data: Splits, samples: int) -> Iterator[tuple[str, float]]:
    """The NLL of each of :data:`KINDS` on the validation images."""
    networks, split = drawn_networks(net, data, samples, SEED), data.validation
    mean, deviation = data.mean[0], data.std[0]  # grey images
    batches = zip(split.images.split(EVAL_BATCH), corrupted(split, "fog", STRENGTH))
    parts = [parts_of_fog(clean.float() / 255, fog.float() / 255) for clean, fog in batches]
    for kind in KINDS:
        found = ask(networks, [(part[kind] - mean) / deviation for part in parts], data)
        yield kind, nll_of(found.probs, split.labels)


def answer_to_light(layer: PackedLayer) -> float:
    """|sum of weights| over the norm, the mean over the filters."""
    weight = layer.weight.flatten(1)
    return float((weight.sum(1).abs() / weight.norm(dim=1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--case", choices=CASES, default="lenet5-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        base, folder = replace(CASES[arguments.case], seed=seed), arguments.out / f"{arguments.case}-{seed}"
        for name, samples in (("deterministic", 1), ("mixture", 1), ("mixture", 16)):
            trainer = train_network(name, base, folder, arguments.data)
            net = pack(trainer.net)
            text = "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses(net, trainer.data, samples))
            first = next(module for module in net.modules() if isinstance(module, PackedLayer))
            print(f"{name:<14}{samples:>3} seed {seed}  {text}  light {answer_to_light(first):.2f}", flush=True)


if __name__ == "__main__":
    main()
