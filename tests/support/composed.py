"""What is held of every composed layer, from convert to a file and back to torch's layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bqnn


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def quantized(net: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The Bayes network in evaluation mode, the packed one, and torch's own layers with the quantized weights."""
    bayes = bqnn.convert(net, 3, **options).eval()
    packed = bqnn.pack(bayes)
    return bayes, packed, bqnn.dequantize(packed)


def check_equal(net: nn.Module, call: Callable[[nn.Module], Any], **options: Any) -> None:
    """Both quantized forms compute what torch's layers with the quantized weights do, to 1e-5 of the largest output."""
    *forms, plain = quantized(net, **options)
    assert [type(module) for module in plain.modules()] == [type(module) for module in net.modules()]
    assert list(plain.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        expected = call(plain)
        for form in forms:
            torch.testing.assert_close(call(form), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def check_life(net: nn.Module, x: Tensor, path: Path, layers: int, kl_count: int | None = None) -> nn.Module:
    """Trains a step, packs, saves, loads into every form, samples, predicts and compiles; gives the packed network."""
    plain_names = list(net.state_dict())
    bayes = bqnn.convert(net, 3)
    posteriors = bqnn.bayes.layers.bayes_layers(bayes)
    assert len(posteriors) == layers and list(net.state_dict()) == plain_names, "the original is left alone"
    (first(bayes(x)).square().mean() + 1e-3 * bqnn.kl_divergence(bayes)).backward()
    for name, layer in posteriors.items():
        for parameter in (layer.mean, layer.log_sigma2, layer.raw_levels):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    total = sum(layer.kl_divergence() for layer in posteriors.values())
    torch.testing.assert_close(bqnn.kl_divergence(bayes), total)
    groups = bqnn.parameter_groups(bayes, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(bayes.parameters()))
    packed = bqnn.pack(bayes)
    bqnn.save(packed, path)
    assert len(bqnn.info(path)["layers"]) == len(bqnn.report(packed).layers) == layers
    with torch.no_grad():
        expected = first(packed(x))
        for model in (net, bayes, packed, bqnn.dequantize(packed)):
            assert torch.equal(first(bqnn.load(path, model=model)(x)), expected)
        bqnn.save(bayes.eval(), path)
        for model in (net, bayes):
            assert torch.equal(first(bqnn.load(path, model=model)(x)), first(bayes(x)))
        for source in (bayes, packed):
            assert torch.equal(first(bqnn.sample(source, seed=3)(x)), first(bqnn.sample(source, seed=3)(x)))
        assert not torch.equal(first(bqnn.sample(packed, seed=3)(x)), first(bqnn.sample(packed, seed=4)(x)))
        again = bqnn.convert(net, 3).eval()
        again.load_state_dict(bayes.state_dict())
        torch.testing.assert_close(first(again(x)), first(bayes.eval()(x)))
        again.load_state_dict({**again.state_dict(), **net.state_dict()}, strict=False)
        torch.testing.assert_close(first(again(x)), first(bqnn.convert(net, 3).eval()(x)))
    return packed
