"""Gradients to the inputs of packed layers, for saliency and adapters: in every precision and on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.check import PRECISIONS

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(37, 5), (3, 2, 37)),
    "strides": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1), (2, 3, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=4), (2, 4, 6, 5)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5)),
}
DTYPES = {"float32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-6), "bfloat16": (torch.bfloat16, 3e-2)}


def make(kind: str, precision: str, execution: str, num_levels: int = 3, relu: bool = False) -> tuple[Any, Any]:
    """A packed layer, and torch's own with its weight in float64."""
    torch.manual_seed(1)
    net = nn.Sequential(LAYERS[kind][0](), *([nn.ReLU()] if relu else []))
    packed = bqnn.pack(bqnn.convert(net, num_levels).eval(), precision, execution)
    return packed, bqnn.dequantize(packed).double()


def draw(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def check(packed: nn.Module, plain: nn.Module, x: Tensor, tolerance: float) -> None:
    """The gradient is that of the product with the weight, where what the packed layer gave is above its ReLU."""
    y = packed(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    (found,) = torch.autograd.grad(y, x, upstream)
    exact = x.detach().double().requires_grad_()
    masked = torch.where(y > 0, upstream, 0.0) if len(list(plain.children())) > 1 else upstream
    (expected,) = torch.autograd.grad(plain[0](exact), exact, masked.double())
    assert found.dtype == x.dtype and found.shape == x.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("execution", ["packed", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_layers(kind: str, precision: str, execution: str, dtype: str) -> None:
    kept, tolerance = DTYPES[dtype]
    for relu in (False, True):
        check(*make(kind, precision, execution, relu=relu), draw(kind, kept), tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_levels", [2, 5, 16])
def test_gradients_on_every_backend(
    backend: str, precision: str, num_levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bqnn.backends()["packed_linear"]["cpu"][backend].usable:
        pytest.skip(bqnn.backends()["packed_linear"]["cpu"][backend].reason)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    for kind in ("linear", "strides"):
        check(*make(kind, precision, "packed", num_levels), draw(kind), 1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_adapter_before_and_after_packed_layers_learns(precision: str) -> None:
    packed, plain = make("linear", precision, "auto")
    torch.manual_seed(0)
    adapted = nn.Sequential(nn.Linear(37, 37), packed, nn.Linear(5, 2))
    x = torch.randn(9, 37)
    adapted(x).sum().backward()
    gradient = adapted[0].weight.grad.clone()
    reference = nn.Sequential(adapted[0], plain.float(), adapted[2])
    adapted.zero_grad()
    reference(x).sum().backward()
    torch.testing.assert_close(gradient, adapted[0].weight.grad, rtol=1e-4, atol=1e-5)
    assert not list(packed.parameters()), "there is nothing else to learn"


def test_autocast_changes_no_gradient() -> None:
    (packed, plain), x = make("strides", "fp32", "auto"), draw("strides")
    with torch.autocast("cpu", torch.bfloat16):
        check(packed, plain, x, 1e-5)


def test_second_gradients_are_refused() -> None:
    (packed, _), x = make("linear", "fp32", "auto"), draw("linear")
    (gradient,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="bqnn::packed_linear_backward has no gradient"):
        gradient.sum().backward()


def test_a_codebook_has_no_gradient() -> None:
    (packed, _), x = make("linear", "fp32", "auto"), draw("linear")
    packed[0].levels.requires_grad_()
    with pytest.raises(NotImplementedError, match="has a gradient for x, and no gradient for levels and bias"):
        packed(x).sum().backward()
