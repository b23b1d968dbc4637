"""Triton 3.8's interpreter keeps a bfloat16 as its 16 bits: it computes with those, and casts cut off. Mended here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even; its bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


@contextmanager
def bfloat16_is_right() -> Iterator[None]:
    """Arithmetic of bfloat16 is that of the numbers, rounded; products sum in the accumulator's dtype; casts round."""
    binary, cast, dot = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    to_float = InterpreterBuilder.create_fp_to_fp

    def is_rounding(src: TensorHandle, dst_type: Any) -> bool:
        return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if is_rounding(src, dst_type):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, mode: Any) -> TensorHandle:
        if is_rounding(src, dst_type):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return to_float(self, src, dst_type, mode)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        output = op(widened(lhs.data), widened(rhs.data))
        return TensorHandle(output if output.dtype == np.bool_ else rounded(output), tl.bfloat16)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widened(operand.data), tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "binary_op", binary_op)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
        for name in ("cast_impl", "create_fp_trunc", "create_fp_ext"):
            patch.setattr(InterpreterBuilder, name, cast_impl)
        yield
