"""The memory of arguments: what an op of ``torch.ops.bqnn_cpu`` writes is its own, and all of a tensor is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core.codes import pack_codes, packed_width
from bqnn.ops.backends.cpu_layout import make_layout
from tests.support.contracts import extension
from tests.support.draws import Draw

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")

ops = torch.ops.bqnn_cpu
CODES = pack_codes(torch.arange(720).view(20, 36).remainder(3).byte(), 3)
LEVELS = torch.tensor([[-1.0, 0.25, 1.5]])
CONV2D = [1, 1], [1, 1], [1, 1]


def refused(name: str, call: Callable[[], Any]) -> None:
    """``call`` has to raise a ValueError: the argument's name, what it needs, what it got."""
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be .+, got "):
        call()


def linear_layout() -> Tensor:
    return make_layout(CODES, LEVELS, 36, "fp32")


def layout_arguments(**changes: Any) -> dict[str, Any]:
    integers, scale = torch.zeros(1, 3, dtype=torch.int8), torch.zeros(1)
    arguments = {"codes": CODES, "levels": LEVELS, "int8_levels": integers, "int8_scale": scale, "columns": 36}
    return {**arguments, "kernel_size": [], "dilation_w": 1, "groups": 1, "precision": "fp32", **changes}


@pytest.mark.parametrize("op", [name for name, each in extension().items() if len(each.written) > 0])
def test_outputs_have_memory_of_their_own(op: str) -> None:
    """What is written is neither an input nor another output."""
    contract, tried = extension()[op], 0
    for number in range(20):
        arguments = {name: make(draw) for draw in [Draw(f"{number}")] for name, make in contract.arguments.items()}
        for name in contract.written:
            for other, value in arguments.items():
                own = arguments[name]
                if other == name or not isinstance(value, Tensor) or not isinstance(own, Tensor) or own.numel() == 0:
                    continue
                if value.shape != own.shape or value.dtype != own.dtype or value.stride() != own.stride():
                    continue
                tried += 1
                with pytest.raises(ValueError, match=r"^\w+ must be memory of its own, got some of another argument's"):
                    contract.run(**{**arguments, name: value})
    assert tried or op in ("random_words", "assign_codes", "spike_slab_kl")


def test_a_part_of_an_input_is_no_output() -> None:
    memory = torch.ones(24)
    refused("out", lambda: ops.square(memory[:16], memory[8:]))
    ops.square(memory[:12], memory[12:])


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_elements_are_aligned(offset: int) -> None:
    x = torch.frombuffer(bytearray(4 * 36 + offset), dtype=torch.float32, offset=offset)
    refused("x", lambda: ops.square(x, torch.empty(36)))
    refused("out", lambda: ops.square(torch.empty(36), x))
    refused("x", lambda: ops.packed_linear(x[None], linear_layout(), None))
    refused("bias", lambda: ops.packed_linear(torch.ones(36), linear_layout(), x[:20]))


@pytest.mark.parametrize("left", [0.0, 0.9])
def test_a_tensor_lies_in_its_storage(left: float) -> None:
    """Somebody may have made a storage smaller than a tensor in it."""

    def small(tensor: Tensor) -> Tensor:
        tensor.untyped_storage().resize_(int(left * tensor.nbytes))
        return tensor

    refused("x", lambda: ops.square(small(torch.ones(36)), torch.empty(36)))
    refused("out", lambda: ops.square(torch.ones(36), small(torch.empty(36))))
    refused("seed", lambda: ops.add_noise(torch.ones(2), torch.ones(2), small(torch.tensor(1)), 0, False))
    refused("layout", lambda: ops.packed_linear(torch.ones(36), small(linear_layout()), None))
    columns = torch.ones(36, 2)
    row = columns[:, 0]
    small(columns)
    refused("x", lambda: ops.packed_linear(row, linear_layout(), None))
    refused("bias", lambda: ops.packed_linear(torch.ones(36), linear_layout(), small(torch.ones(20))))


def test_no_tensor_is_named() -> None:
    refused("x", lambda: ops.square(None, torch.empty(0)))
    refused("levels", lambda: ops.packed_layout(**layout_arguments(levels=None)))
    refused("layout", lambda: ops.packed_linear(torch.ones(36), None, None))


def test_more_numbers_than_memory_has_addresses() -> None:
    refused("x", lambda: ops.packed_linear(torch.ones(1, 36).expand(2**50, 36), linear_layout(), None))
    shape = (0, 4, 2**31, 2**31)
    x = torch.empty(0).as_strided(shape, (0, 0, 0, 0))
    refused("x", lambda: ops.packed_conv2d(x, make_layout(CODES, LEVELS, 36, "fp32", (3, 3)), None, *CONV2D))


def test_sums_of_integers_fit_32_bits() -> None:
    columns = 200_000
    arguments = layout_arguments(
        codes=torch.zeros(1, packed_width(columns, 3), dtype=torch.uint8), columns=columns, kernel_size=[]
    )
    for integers, precision in (([-80, 0, 80], "int8"), ([-127, 0, 127], "fp32")):
        ops.packed_layout(**{**arguments, "int8_levels": torch.tensor([integers]).char(), "precision": precision})
    arguments |= {"int8_levels": torch.tensor([[-127, 0, 127]]).char(), "precision": "int8"}
    refused("int8_levels", lambda: ops.packed_layout(**arguments))


def test_a_bias_is_of_floating_point_numbers() -> None:
    for dtype in (torch.complex64, torch.int64, torch.bool):
        refused(
            "bias", lambda dtype=dtype: ops.packed_linear(torch.ones(36), linear_layout(), torch.ones(20).to(dtype))
        )


def test_a_string_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"^precision must be .*, got \"x{40}\.\.\.\"$"):
        ops.packed_layout(**layout_arguments(precision="x" * 1_000_000))
