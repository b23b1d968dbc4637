"""``python -m bench.fog_lenet5 --out runs/uncertainty``: what of fog it is that networks lose by, on validation images.

Takes the networks of ``python -m bench.uncertainty_lenet5 --out runs/uncertainty``. Fog makes images brighter, weakens
their contrast and adds clouds. A row a network gives the NLL, in nats, where each image has of its fog: all; its
contrast and clouds, with the brightness of the clean image; its clouds alone; its brightness alone; and its contrast
alone. Then how far the first layer's filters answer to constant light: |sum of weights| over their norm, the mean over
filters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bench.uncertainty_lenet5 import SAMPLES, SEED, parser_of_runs, trained_networks
from bqnn.data.splits import Splits
from bqnn.engine.pack import pack
from bqnn.lab.evaluate import EVAL_BATCH
from bqnn.lab.metrics import nll_of
from bqnn.lab.uncertainty import ask, corrupted, drawn_networks
from bqnn.packed.base import PackedLayer

STRENGTH = 5
SAMPLES_OF = {"deterministic": (1,), "mixture": (1, SAMPLES)}
"""The networks, and how many are drawn of each."""
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


def fogged(data: Splits) -> list[dict[str, Tensor]]:
    """The validation images, grey ones, batch by batch: :func:`parts_of_fog`, standardised."""
    images, mean, deviation = data.validation.images, data.mean[0], data.std[0]
    batches = zip(images.split(EVAL_BATCH), corrupted(data.validation, "fog", STRENGTH))
    made = (parts_of_fog(clean.float() / 255, fog.float() / 255) for clean, fog in batches)
    return [{kind: (x - mean) / deviation for kind, x in parts.items()} for parts in made]


def losses(networks: Sequence[nn.Module], batches: Sequence[dict[str, Tensor]], data: Splits) -> dict[str, float]:
    """The NLL of each of :data:`KINDS`."""
    found = {kind: ask(networks, [parts[kind] for parts in batches], data).probs for kind in KINDS}
    return {kind: nll_of(probs, data.validation.labels) for kind, probs in found.items()}


def answer_to_light(layer: PackedLayer) -> float:
    """|sum of weights| over the norm, the mean over the filters."""
    weight = layer.weight.flatten(1)
    return float((weight.sum(1).abs() / weight.norm(dim=1)).mean())


def main() -> None:
    arguments = parser_of_runs(__doc__).parse_args()
    for name, trained in trained_networks(arguments, list(SAMPLES_OF)):
        net, data = pack(trained.net), trained.data
        light = answer_to_light(next(module for module in net.modules() if isinstance(module, PackedLayer)))
        batches = fogged(data)
        for samples in SAMPLES_OF[name]:
            found = losses(drawn_networks(net, data, samples, SEED), batches, data)
            text = "  ".join(f"{kind} {loss:.3f}" for kind, loss in found.items())
            print(f"{name:<14}{samples:>3} seed {trained.seed}  {text}  light {light:.2f}", flush=True)


if __name__ == "__main__":
    main()
