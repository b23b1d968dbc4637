"""A packed network on every instruction set of the CPU kernels: the same integers, so the same logits."""

from __future__ import annotations

import pytest
import torch

import bqnn
from bqnn.models import lenet5
from tests.support.helpers import digest, lower_isas, run_on_isa


def lenet5_logits() -> str:
    """A checksum of int8 logits: full tiles and fewer rows, both memory formats, both granularities."""
    logits = []
    for num_levels, granularity in ((2, "tensor"), (3, "channel"), (5, "tensor"), (16, "channel")):
        torch.manual_seed(num_levels)
        net = bqnn.convert(lenet5(), num_levels, granularity=granularity)
        packed = bqnn.pack(net, precision="int8", execution="packed")
        for batch in (1, 5, 33):
            x = torch.randn(batch, 1, 28, 28)
            logits += [packed(x), packed(x.contiguous(memory_format=torch.channels_last))]
    assert all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in logits)
    return digest(logits)


@pytest.mark.parametrize("isa", lower_isas())
def test_int8_logits_of_lenet5_are_equal_on_every_instruction_set(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_packed_isas", "lenet5_logits") == lenet5_logits()
