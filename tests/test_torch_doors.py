"""What torch looks at networks with: fx, feature extractors, the FLOP counter, torch.compile in every grad mode, and
torch.jit."""

from __future__ import annotations

import copy
import importlib
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import bqnn
from bqnn.core.imports import when_imported
from bqnn.ops.flops import start_counting


def plain(groups: int = 2) -> Any:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, (3, 1), dilation=2)
    mirrored = nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(1, 1), padding_mode="reflect", groups=groups)
    return nn.Sequential(first, nn.ReLU(), mirrored, nn.Flatten(), nn.Linear(72, 3)).eval()


def bayes(groups: int = 2, **options: Any) -> Any:
    return bqnn.convert(plain(groups), 3, **options).eval()


def packed() -> Any:
    return bqnn.pack(bayes())


def images() -> Tensor:
    return torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(1))


QUANTIZED = [pytest.param(bayes, id="bayes"), pytest.param(packed, id="packed")]


@pytest.mark.parametrize("make", QUANTIZED)
def test_fx_takes_layers_for_leaves(make: Callable[[], Any]) -> None:
    net, x = make(), images()
    expected = net(x)
    traced = fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes] == ["input", "0", "1", "2", "3", "4", "output"]
    assert traced.get_submodule("0") is net[0]
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("make", QUANTIZED)
def test_features_are_those_before_the_relu(make: Callable[[], Any]) -> None:
    net, x = make(), images()
    reference = bqnn.dequantize(net)
    features = create_feature_extractor(net, {"0": "convolved", "1": "rectified", "4": "logits"})(x)
    torch.testing.assert_close(features["convolved"], reference[0](x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["rectified"], reference[:2](x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["logits"], reference(x), rtol=1e-5, atol=1e-5)
    assert (features["convolved"] < 0).any()


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", QUANTIZED)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "gradient"])
def test_flops_are_those_of_torchs_layers(make: Callable[[], Any], requires_grad: bool) -> None:
    x, net, reference = images().requires_grad_(requires_grad), make(), plain().requires_grad_(False)

    def step(net: nn.Module) -> None:
        y = net(x)
        if requires_grad:
            y.sum().backward()

    step(net)  # a layer that has run before is counted too
    assert flops(lambda: step(net)) == flops(lambda: step(reference)) > 0


@pytest.mark.parametrize(
    ("options", "products"),
    [
        pytest.param({"estimator": "sample"}, 1, id="sample"),
        pytest.param({"estimator": "moment"}, 2, id="moment"),
    ],
)
def test_flops_of_a_training_step(options: dict[str, Any], products: int) -> None:
    # Without groups, of which torch forgets to take account in the gradient of a weight.
    net, reference = bayes(1, **options).train(), plain(1).train()

    def step(net: nn.Module) -> None:
        net(images()).sum().backward()

    assert flops(lambda: step(net)) == products * flops(lambda: step(reference))


def test_flops_with_exact_variances_include_that_of_the_variance_made_again() -> None:
    net, reference, x = bayes(1, coarse_variance=False).train(), plain(1), images()
    forward = flops(lambda: reference(x))
    step = flops(lambda: reference(x).sum().backward())
    assert flops(lambda: net(x).sum().backward()) == 2 * step + forward


def test_counting_starts_when_the_counter_is_imported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils, "flop_counter", sys.modules["torch.utils.flop_counter"])  # as it was, afterwards
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")
    start_counting()
    later: Any = importlib.import_module("torch.utils.flop_counter")
    assert later.FlopCounterMode is not FlopCounterMode
    layer = bqnn.PackedLinear(3, torch.zeros(2, 1, dtype=torch.uint8), torch.tensor([[-1.0, 1.0]]))
    with later.FlopCounterMode(display=False) as counter:
        layer(torch.ones(5, 3))
    assert counter.get_total_flops() == 2 * 5 * 2 * 3


def test_when_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], list(sys.meta_path)
    when_imported("imported_later", lambda module: seen.append(module.value))
    assert seen == []
    import imported_later  # type: ignore[import-not-found]

    assert seen == [3] and sys.meta_path == finders
    when_imported("imported_later", lambda module: seen.append(module.value + 1))
    assert seen == [3, 4]
    monkeypatch.delitem(sys.modules, "imported_later")
    assert imported_later.value == 3


@pytest.mark.parametrize("make", QUANTIZED)
def test_torch_compile_in_every_grad_mode(make: Callable[[], Any]) -> None:
    net = make()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for _ in range(2):
                y = compiled(images())
                torch.testing.assert_close(y, net(images()))
        if mode is not torch.enable_grad:
            assert not y.requires_grad
    found, expected = images().requires_grad_(), images().requires_grad_()
    compiled(found).sum().backward()
    net(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", QUANTIZED)
@pytest.mark.parametrize("has_run", [False, True], ids=["new", "has-run"])
def test_torch_jit_traces_a_network_for_any_batch(make: Callable[[], Any], has_run: bool) -> None:
    net, x = make(), images()
    if has_run:
        net(x)
    traced = torch.jit.trace(net, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for each in (traced, torch.jit.load(file)):
        for batch in (x, torch.cat([x, 2 * x])):
            torch.testing.assert_close(each(batch), net(batch))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    traced(found).sum().backward()
    net(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", QUANTIZED)
def test_torch_jit_script_names_the_other_ways(make: Callable[[], Any]) -> None:
    with pytest.raises(NotImplementedError, match="can not read a .*Conv2d; torch.export, torch.compile and torch.jit"):
        torch.jit.script(make())


def test_torch_compile_of_a_training_layer_in_every_grad_mode() -> None:
    torch.compiler.reset()
    net, x = bqnn.convert(nn.Linear(5, 3), 3).train(), torch.randn(4, 5)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            torch.manual_seed(3)
            found = compiled(x)
            torch.manual_seed(3)
            expected = net(x)
            torch.testing.assert_close(found, expected)
            assert found.requires_grad == expected.requires_grad == (mode is torch.enable_grad)
