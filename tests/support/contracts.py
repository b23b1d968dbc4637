"""What the ops of the compiled extension take, declared once: from it valid arguments are drawn, hostile ones made, and
the right answer of either is known.

An op is a :class:`Contract`: for each argument of its schema, in its order, what draws a valid one. To add an op of
``torch.ops.bqnn_cpu`` is to write its line here, and its answer in :mod:`tests.support.answers`.
"""

from __future__ import annotations

import torch

from bqnn.core import native
from tests.support import answers
from tests.support.draws import (
    Contract,
    Maker,
    call_number,
    codes,
    codes_out,
    dilations,
    empty,
    flag,
    floats_or_bfloat16,
    geometry,
    grad_raw_thresholds,
    images,
    int8_levels,
    layout,
    levels,
    mean_out,
    mode,
    numbers,
    optional,
    outputs_of_a_layer,
    packed_or_not,
    paddings,
    raw_thresholds,
    rows,
    seed,
    strides,
    thresholds,
    variance_of_a_layer,
    variances,
    widths,
    words,
)
from tests.support.engine_contracts import engine

POSTERIOR = {"weight": numbers("N", "K"), "log_sigma2": variances("N", "K"), "levels": levels, "thresholds": thresholds}
PRIOR = {"weight": numbers("N", "K"), "log_sigma2": variances("N", "K"), "levels": levels, "tau": widths}
MIXTURE = {
    **{name: PRIOR[name] for name in ("weight", "log_sigma2", "levels")},
    "slab_sigma2": lambda draw: draw.uniform() + 0.1,
    "spike_width": lambda draw: draw.choice((0.25, 0.1, 1.0)),
    "slab_share": lambda draw: draw.choice((0.1, 0.01, 0.5)),
}
NOISE = {"seed": seed, "offset": call_number}
RAW = {"raw_levels": numbers("G", "M"), "scale": lambda draw: draw.uniform(draw.size("G")) + 0.1}
RAW["raw_thresholds"] = raw_thresholds
CODEBOOK_OUT = {"levels": empty("G", "M"), "thresholds": empty("G", "M-1"), "tau": empty("G", "M")}
BY_POSTERIOR = {
    "grad_log_sigma2": empty("N", "K"),
    "grad_levels": empty("G", "M"),
    "grad_thresholds": empty("G", "M-1"),
}
LINEAR = {"x": rows, "layout": layout(True)}
CONV2D = {"x": images, "layout": layout(False)}
STEPS = {"stride": strides, "padding": paddings, "dilation": dilations}
BIAS = optional(numbers("N"))

_DECLARED: dict[str, tuple[dict[str, Maker], tuple[str, ...]]] = {
    "isa": ({}, ()),
    "random_words": ({"seed": lambda draw: int(seed(draw)), "first": call_number, "out": words}, ("out",)),
    "add_noise": (
        {"mean": outputs_of_a_layer, "variance": variance_of_a_layer, **NOISE, "keep_slope": flag},
        ("mean", "variance"),
    ),
    "multiply": ({"grad": outputs_of_a_layer, "slope": outputs_of_a_layer, "out": outputs_of_a_layer}, ("out",)),
    "noise_gradient": (
        {"grad": outputs_of_a_layer, "variance": variance_of_a_layer, **NOISE, "out": outputs_of_a_layer},
        ("out",),
    ),
    "square": ({"x": outputs_of_a_layer, "out": outputs_of_a_layer}, ("out",)),
    "add_square_gradient": (
        {"grad": outputs_of_a_layer, "x": outputs_of_a_layer, "grad_square": outputs_of_a_layer},
        ("grad",),
    ),
    "sample": ({**POSTERIOR, **NOISE, "quantized": empty("N", "K")}, ("quantized",)),
    "sample_backward": (
        {"grad": numbers("N", "K"), **POSTERIOR, **NOISE, "grad_log_sigma2": empty("N", "K")}
        | {"grad_levels": empty("G", "M")},
        ("grad_log_sigma2", "grad_levels"),
    ),
    "moments": (
        {**POSTERIOR, "mode": mode, "mean": mean_out, "variance": floats_or_bfloat16("N", "K")},
        ("mean", "variance"),
    ),
    "moments_backward": (
        {"grad_mean": numbers("N", "K"), "grad_variance": floats_or_bfloat16("N", "K"), **POSTERIOR, "mode": mode}
        | BY_POSTERIOR,
        ("grad_mean", *BY_POSTERIOR),
    ),
    "codebook_from_raw": ({**RAW, **CODEBOOK_OUT}, tuple(CODEBOOK_OUT)),
    "codebook_from_raw_backward": (
        {"grad_levels": numbers("G", "M"), "grad_thresholds": numbers("G", "M-1"), **RAW}
        | {"grad_raw_levels": empty("G", "M"), "grad_raw_thresholds": grad_raw_thresholds},
        ("grad_raw_levels", "grad_raw_thresholds"),
    ),
    "assign_codes": (
        {"weight": numbers("N", "K"), "thresholds": thresholds, "packed": packed_or_not, "out": codes_out},
        ("out",),
    ),
    "spike_slab_kl": ({**PRIOR, "out": lambda draw: torch.full([], float("nan"))}, ("out",)),
    "spike_slab_kl_backward": (
        {"grad": lambda draw: draw.normal(), **PRIOR, "grad_weight": empty("N", "K")}
        | {name: BY_POSTERIOR[name] for name in ("grad_log_sigma2", "grad_levels")},
        ("grad_weight", "grad_log_sigma2", "grad_levels"),
    ),
    "mixture_kl": ({**MIXTURE, "out": lambda draw: torch.full([], float("nan"))}, ("out",)),
    "mixture_kl_backward": (
        {"grad": lambda draw: draw.normal(), **MIXTURE, "grad_weight": empty("N", "K")}
        | {name: BY_POSTERIOR[name] for name in ("grad_log_sigma2", "grad_levels")},
        ("grad_weight", "grad_log_sigma2", "grad_levels"),
    ),
    "packed_layout": (
        {"codes": codes, "levels": levels, "int8_levels": int8_levels}
        | {"int8_scale": lambda draw: draw.uniform(draw.size("G")) + 0.01}
        | {"columns": lambda draw: geometry(draw).columns, "kernel_size": lambda draw: list(geometry(draw).kernel)}
        | {"dilation_w": lambda draw: geometry(draw).dilation[1], "groups": lambda draw: geometry(draw).groups}
        | {"precision": lambda draw: geometry(draw).precision},
        (),
    ),
    "packed_linear": ({**LINEAR, "bias": BIAS, "relu": flag}, ()),
    "packed_conv2d": ({**CONV2D, "bias": BIAS, **STEPS, "relu": flag}, ()),
    "packed_linear_kernel": (LINEAR, ()),
    "packed_conv2d_kernel": ({**CONV2D, **STEPS}, ()),
}

_READ = {"add_noise": ("mean", "variance"), "add_square_gradient": ("grad",), "moments_backward": ("grad_mean",)}
"""Outputs that are inputs too."""


def extension() -> dict[str, Contract]:
    """The contracts of ``torch.ops.bqnn_cpu``, by name; none where it is not built."""
    if native.MISSING:
        return {}
    found = {
        name: Contract(
            getattr(torch.ops.bqnn_cpu, name),
            arguments,
            getattr(answers, name),
            True,
            written,
            tuple(each for each in written if each not in _READ.get(name, ())),
        )
        for name, (arguments, written) in _DECLARED.items()
    }
    return found | engine()
