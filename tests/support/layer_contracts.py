"""What the layers take, Bayesian and packed ones: declared as the other public functions are, see public_contracts.py.

A call makes a layer and hands it an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

import bqnn
from bqnn.core.codes import unpack_codes
from tests.support import draws
from tests.support.answers import RETURNED, Answer, Answers, Arguments
from tests.support.draws import Draw, Maker, flag, numbers, optional
from tests.support.public_answers import unknown


class LayerContract(NamedTuple):
    """What makes a layer and calls it, what that takes, and what it has to answer."""

    run: Callable[..., Any]
    arguments: dict[str, Maker]
    answer: Callable[[Draw, Arguments, set[str]], Answers] = unknown


# --- what layers and ops share ----------------------------------------------------------------------------------------


def linear_input(draw: Draw) -> Tensor:
    return draw.normal(*draw.choice(([], [1], [draw.randint(0, 9)], [2, 3])), draw.size("K"))


def conv2d_input(draw: Draw) -> Tensor:
    return draws.images(draw).float()


def groups(draw: Draw) -> int:
    return draws.geometry(draw, False).groups


def kernel_size(draw: Draw) -> list[int]:
    return list(draws.geometry(draw, False).kernel)


def precision(draw: Draw) -> str:
    return draws.geometry(draw).precision


def one_of(*values: Any) -> Maker:
    return lambda draw: draw.choice(values)


def sized(name: str) -> Maker:
    return lambda draw: draw.size(name)


def options(draw: Draw) -> dict[str, Any]:
    return {
        "num_levels": draw.choice((2, 3, 4)),
        "granularity": draw.choice(("tensor", "channel")),
        "partition": draw.choice(("nearest", "learned")),
        "estimator": draw.choice(("moment", "sample", "local", "deterministic")),
        "prior": draw.choice(("spike_slab", "gaussian", "mixture")),
        "spike_width": draw.choice((0.25, 0.1, 1.0)),
        "slab_share": draw.choice((0.1, 0.01, 0.5)),
        "start_sigma": draw.choice((0.1, 0.3)),
    }


def option(name: str) -> Maker:
    return lambda draw: draw.facts.setdefault("options", options(draw))[name]


OPTION_NAMES = ("num_levels", "granularity", "partition", "estimator", "prior")
OPTION_NAMES += ("spike_width", "slab_share", "start_sigma")
OPTIONS = {name: option(name) for name in OPTION_NAMES}
FLAGS = {"quantize_mean": flag, "coarse_variance": flag}


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_called(make: Callable[..., nn.Module], given: str = "x") -> Callable[..., Any]:
    """Makes a layer and calls it with the argument ``given``, in training and in evaluation mode, with a gradient."""

    def run(**keywords: Any) -> Any:
        x = keywords.pop(given)
        layer = make(**keywords)
        y = layer(x)
        if layer.training and y.requires_grad:
            y.sum().backward()
        return layer.eval()(x)

    return run


def signals(draw: Draw) -> Tensor:
    """What a convolution of one dimension takes, [B, C, L], whose height is 1 from here on."""
    own = draws.geometry(draw, False)
    draw.facts["geometry"] = own._replace(kernel=[1, own.kernel[1]], dilation=[1, own.dilation[1]])
    return conv2d_input(draw)[:, :, 0]


def convolution(dimensions: int) -> dict[str, Maker]:
    """The input, and what makes an nn.Conv1d or nn.Conv2d."""

    def along(maker: Callable[[Draw], Sequence[int]]) -> Maker:
        return lambda draw: tuple(maker(draw)[-dimensions:])

    def padding(draw: Draw) -> tuple[int, ...]:
        draw.facts["padding"] = along(draws.paddings)(draw)
        return draw.facts["padding"]

    def padding_mode(draw: Draw) -> str:
        """What repeats or mirrors x needs as much of it: an image has one pixel or more."""
        return draw.choice(("zeros", "zeros", "replicate", *["circular"] * (max(draw.facts["padding"]) < 2)))

    return {
        "x": signals if dimensions == 1 else conv2d_input,
        "in_channels": lambda draw: draws.geometry(draw, False).inputs * groups(draw),
        "out_channels": sized("N"),
        "kernel_size": along(kernel_size),
        "stride": along(draws.strides),
        "padding": padding,
        "dilation": along(draws.dilations),
        "groups": groups,
        "padding_mode": padding_mode,
    }


def without_channels(makers: dict[str, Maker]) -> dict[str, Maker]:
    """A packed layer has as many as there are rows of codes."""
    return {name: maker for name, maker in makers.items() if name != "out_channels"}


def indices(draw: Draw) -> Tensor:
    return draw.integers(draw.size("N"), *draw.choice(([], [1], [draw.randint(0, 9)], [2, 3])))


def table_codes(draw: Draw) -> Tensor:
    draws.geometry(draw, True)  # a row of the table has K numbers, and no kernel
    return draws.codes(draw)


def rows_of_the_table(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    """Levels, to the bit."""
    levels = given["levels"].detach().double()
    found = unpack_codes(given["codes"], levels.shape[1], int(given["embedding_dim"])).long()
    table = levels.expand(len(found), -1).gather(1, found)
    return {RETURNED: Answer(table[given["indices"].long()], 0.0)}


LINEAR = {"x": linear_input, "in_features": sized("K"), "out_features": sized("N")}
CONV1D, CONV2D = convolution(1), convolution(2)
EMBEDDING = {
    "num_embeddings": sized("N"),
    "indices": indices,
    "embedding_dim": sized("K"),
    "padding_idx": optional(lambda draw: draw.randrange(draw.size("N"))),
}
BAYES = {**OPTIONS, **FLAGS}
CODES = {"codes": draws.codes, "levels": draws.levels, "bias": optional(numbers("N"))}
CHANCES = {"chances": optional(draws.chances)}
PACKED = {
    **CODES,
    **CHANCES,
    "precision": precision,
    "execution": one_of("auto", "packed", "dense"),
    "relu": flag,
}
PACKED_EMBEDDING = {
    "codes": table_codes,
    "levels": draws.levels,
    **{name: EMBEDDING[name] for name in ("indices", "embedding_dim", "padding_idx")},
    **CHANCES,
}

LAYERS = {
    "BayesLinear": LayerContract(layer_called(bqnn.BayesLinear), {**LINEAR, **BAYES}),
    "BayesConv1d": LayerContract(layer_called(bqnn.BayesConv1d), {**CONV1D, **BAYES}),
    "BayesConv2d": LayerContract(layer_called(bqnn.BayesConv2d), {**CONV2D, **BAYES}),
    "BayesEmbedding": LayerContract(layer_called(bqnn.BayesEmbedding, "indices"), {**EMBEDDING, **BAYES}),
    "PackedLinear": LayerContract(
        layer_called(bqnn.PackedLinear), {"x": draws.rows, "in_features": sized("K"), **PACKED}
    ),
    "PackedConv1d": LayerContract(layer_called(bqnn.PackedConv1d), {**without_channels(CONV1D), **PACKED}),
    "PackedConv2d": LayerContract(layer_called(bqnn.PackedConv2d), {**without_channels(CONV2D), **PACKED}),
    "PackedEmbedding": LayerContract(
        layer_called(bqnn.PackedEmbedding, "indices"), PACKED_EMBEDDING, rows_of_the_table
    ),
}
KEPT = {
    "BayesLinear": frozenset({"in_features", "out_features"}),
    "BayesConv1d": frozenset(CONV1D) - {"x"},
    "BayesConv2d": frozenset(CONV2D) - {"x"},
    # torch's own check of sizes and of the padding index; and of indices past the end, whose error names no argument.
    "BayesEmbedding": frozenset(EMBEDDING),
    "PackedEmbedding": frozenset({"indices"}),
}
"""Arguments that go to torch as they are."""
