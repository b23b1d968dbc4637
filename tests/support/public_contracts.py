"""What the public functions of bqnn and bqnn.ops take: declared as the ops of the extension are, see contracts.py.

Their answers are those of public_answers.py; layers are in layer_contracts.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import bqnn
from bqnn import ops
from bqnn.core import codebook, codes
from bqnn.ops.codebook_from_raw import codebook_from_raw
from tests.support import contracts, draws
from tests.support.answers import Answers
from tests.support.draws import Contract, Draw, Maker, flag, numbers, optional, variances
from tests.support.layer_contracts import (
    CODES,
    FLAGS,
    KEPT,
    LAYERS,
    OPTIONS,
    conv2d_input,
    groups,
    kernel_size,
    linear_input,
    one_of,
    options,
    precision,
    sized,
)
from tests.support.public_answers import by_reference, exactly, unknown, unless_a_cell_is_close

NETWORKS = 256
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def in_dtype(maker: Maker) -> Maker:
    """In a dtype that is the same for all tensors of the call."""

    def make(draw: Draw) -> Any:
        dtype = draw.facts.setdefault("dtype", draw.choice(DTYPES))
        found = maker(draw)
        return found.to(dtype) if isinstance(found, Tensor) else found

    return make


def backend(draw: Draw) -> str | None:
    return draw.choice((None, None, None, "reference"))


# --- layers' weights --------------------------------------------------------------------------------------------------


def kernel_weight(draw: Draw) -> Tensor:
    own = draws.geometry(draw, False)
    return draw.normal(draw.size("N"), own.inputs, *own.kernel)


def kernel_variance(draw: Draw) -> Tensor:
    return kernel_weight(draw).abs() - 4.0


def modes(draw: Draw) -> str:
    return draw.choice(("categorical", "gaussian", "straight_through"))


CODEBOOK = {"levels": in_dtype(draws.levels), "thresholds": in_dtype(draws.thresholds)}
BIAS = {"bias": in_dtype(optional(numbers("N")))}
LINEAR = {"weight": in_dtype(numbers("N", "K")), "log_sigma2": in_dtype(variances("N", "K")), **CODEBOOK, **BIAS}
CONV2D = {"weight": in_dtype(kernel_weight), "log_sigma2": in_dtype(kernel_variance), **CODEBOOK, **BIAS}
NOISE = {"seed": draws.seed, "offset": draws.call_number}
MOMENT = {**NOISE, "mode": modes, "coarse_variance": flag}
STEPS = {**contracts.STEPS, "groups": groups}
BACKEND = {"backend": backend}


# --- networks ---------------------------------------------------------------------------------------------------------


def plain_net(draw: Draw) -> nn.Module:
    torch.manual_seed(draw.getrandbits(60))
    convolution = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    rows = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 3))
    return draw.choice((nn.Linear(4, 3), rows, convolution))


def bayes_net(draw: Draw) -> nn.Module:
    """One of :data:`NETWORKS`: to make a network takes longer than any function that is called with one."""
    draw.facts["net"] = _network(draw.randrange(NETWORKS))
    torch.manual_seed(draw.getrandbits(60))
    return draw.facts["net"]


def sampled_net(draw: Draw) -> nn.Module:
    """A copy with a posterior."""
    net = draw.facts["net"] = copy.deepcopy(bayes_net(draw))
    for layer in bqnn.bayes.layers.bayes_layers(net).values():
        layer.estimator = draw.choice(("moment", "sample", "local"))
    return net


def packed_net(draw: Draw) -> nn.Module:
    """What :func:`sampled_net` is packed to."""
    draw.facts["net"] = bqnn.pack(sampled_net(draw))
    return draw.facts["net"]


@cache
def _network(number: int) -> nn.Module:
    draw = Draw(f"network {number}")
    return bqnn.convert(plain_net(draw), **options(draw))


def net_input(draw: Draw) -> Tensor:
    """Of the network that was drawn last."""
    net = draw.facts["net"]
    has_images = any(isinstance(each, (nn.Conv2d, bqnn.PackedConv2d)) for each in net.modules())
    return draw.normal(5, 1, 4, 4) if has_images else draw.normal(5, 4)


def samples(draw: Draw) -> int:
    layers = bqnn.bayes.layers.bayes_layers(draw.facts["net"]).values()
    return draw.choice((1, 1, 2)) if any(layer.estimator != "deterministic" for layer in layers) else 1


def logits(draw: Draw) -> Tensor:
    return draw.normal(5, 3)


PACK = {"precision": one_of("fp32", "bf16", "int8"), "execution": one_of("auto", "packed", "dense")}


def unpacked(draw: Draw) -> Tensor:
    return draw.integers(draw.size("M"), draw.size("N"), draw.size("K")).to(torch.uint8)


def packed_bytes(draw: Draw) -> Tensor:
    return codes.pack_codes(unpacked(draw), draw.size("M"))


_RAW = {"raw_levels": in_dtype(numbers("G", "M")), "scale": lambda draw: draw.uniform(draw.size("G"), 1) + 0.1}
_RAW["raw_thresholds"] = in_dtype(draws.raw_thresholds)
_SPIKES = {"levels": in_dtype(draws.levels), "tau": in_dtype(draws.widths), **BACKEND}
_MIXTURE = {"levels": in_dtype(draws.levels)} | {
    name: in_dtype(contracts.MIXTURE[name]) for name in ("slab_sigma2", "spike_width", "slab_share")
}
_MIXTURE |= BACKEND
_POSTERIOR = {name: LINEAR[name] for name in ("weight", "log_sigma2")}


def public() -> dict[str, Contract]:
    """The contracts of the public functions, by name."""
    _samples = {"x": in_dtype(linear_input), **LINEAR, **NOISE, **BACKEND}
    table: dict[str, tuple[Callable[..., Any], dict[str, Maker], Callable[..., Answers]]] = {
        "assign_codes": (
            ops.assign_codes,
            {name: LINEAR[name] for name in ("weight", "thresholds")} | {"packed": flag, **BACKEND},
            exactly(ops.assign_codes),
        ),
        "sample_linear": (ops.sample_linear, _samples, unless_a_cell_is_close(ops.sample_linear)),
        "sample_conv2d": (
            ops.sample_conv2d,
            {"x": in_dtype(conv2d_input), **CONV2D, **NOISE, **STEPS, **BACKEND},
            unless_a_cell_is_close(ops.sample_conv2d),
        ),
        "moment_linear": (
            ops.moment_linear,
            {"x": in_dtype(linear_input), **LINEAR, **MOMENT, **BACKEND},
            unless_a_cell_is_close(ops.moment_linear),
        ),
        "moment_conv2d": (
            ops.moment_conv2d,
            {"x": in_dtype(conv2d_input), **CONV2D, **MOMENT, **STEPS, **BACKEND},
            unless_a_cell_is_close(ops.moment_conv2d),
        ),
        "spike_slab_kl": (ops.spike_slab_kl, {**_POSTERIOR, **_SPIKES}, by_reference(ops.spike_slab_kl)),
        "mixture_kl": (ops.mixture_kl, {**_POSTERIOR, **_MIXTURE}, by_reference(ops.mixture_kl)),
        "packed_linear": (
            ops.packed_linear,
            {"x": draws.rows, **CODES, "precision": precision, "layout": optional(draws.nothing), **BACKEND}
            | {"relu": flag},
            by_reference(ops.packed_linear, ("levels",)),
        ),
        "packed_conv2d": (
            ops.packed_conv2d,
            {"x": draws.images, **CODES, "kernel_size": kernel_size, **STEPS, "precision": precision}
            | {"layout": draws.nothing, **BACKEND, "relu": flag},
            by_reference(ops.packed_conv2d, ("levels",)),
        ),
        "codebook_from_raw": (codebook_from_raw, {**_RAW, **BACKEND}, by_reference(codebook_from_raw)),
        "lloyd_max": (
            codebook.lloyd_max,
            {"values": in_dtype(numbers("N", "K")), "num_levels": sized("M"), "spread": one_of(1.0, 0.5)},
            unknown,
        ),
        "pack_codes": (codes.pack_codes, {"codes": unpacked, "num_levels": sized("M")}, unknown),
        "unpack_codes": (
            codes.unpack_codes,
            {"packed": packed_bytes, "num_levels": sized("M"), "columns": sized("K")},
            unknown,
        ),
        **LAYERS,
        "predict": (
            bqnn.predict,
            {"net": bayes_net, "x": net_input, "samples": samples, "seed": one_of(None, 0, 5)},
            unknown,
        ),
        "sample": (bqnn.sample, {"net": sampled_net, "seed": one_of(None, 0, 5)}, unknown),
        "sample_packed": (bqnn.sample, {"net": packed_net, "seed": one_of(None, 0, 5)}, unknown),
        "predict_packed": (
            bqnn.predict,
            {"net": packed_net, "x": net_input, "samples": one_of(1, 2), "seed": one_of(None, 0, 5)},
            unknown,
        ),
        "kl_divergence": (bqnn.kl_divergence, {"net": bayes_net}, unknown),
        "kl_warmup": (bqnn.kl_warmup, {"progress": one_of(0.0, 0.5, 3), "length": one_of(0.0, 1.0, 5)}, unknown),
        "elbo": (
            bqnn.elbo,
            {"output": logits, "target": lambda draw: draw.integers(3, 5), "net": bayes_net}
            | {"dataset_size": one_of(1, 100), "kl_weight": one_of(0.0, 1.0)},
            unknown,
        ),
        "parameter_groups": (
            bqnn.parameter_groups,
            {"net": bayes_net, "lr": one_of(0.1), "codebook_lr": one_of(0.1), "variance_lr": one_of(1.0)}
            | {"weight_decay": one_of(0.0, 0.1)},
            unknown,
        ),
        "convert": (bqnn.convert, {"net": plain_net, **OPTIONS, **FLAGS}, unknown),
        "pack": (bqnn.pack, {"net": bayes_net, **PACK, "fuse_relu": flag}, unknown),
        "dequantize": (bqnn.dequantize, {"net": bayes_net}, unknown),
    }
    return {
        name: Contract(
            run, arguments, answer, ours=False, kept=_KEPT.get(name, frozenset()), costly=COSTLY, also_named=MADE
        )
        for name, (run, arguments, answer) in table.items()
    }


COSTLY = {"samples": (1000, math.inf), "padding": (300, 2**31)}
"""Values between these are taken and cost what they ask for; larger paddings are more than memory holds."""
MADE = frozenset({"weight", "weights", "layer"})
"""What an error may name beside the arguments: what is made of them."""
_KEPT = {
    **KEPT,
    "predict": frozenset({"x"}),
    "predict_packed": frozenset({"x"}),
    "elbo": frozenset({"output", "target"}),
}
