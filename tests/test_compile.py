"""bqnn.compile and what it gives: the built-in and torchvision's networks, inputs of all kinds, copies and threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig as BlockConfig

import bqnn
from bqnn import models
from bqnn.engine import compiled as module
from bqnn.engine.compiled import CompiledNetwork
from tests.support.compiled import Function, compiled, ops, packed, randomized, reasons


def images(channels: int, size: int, count: int = 2) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(13))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return packed(nn.Sequential(*layers))


@pytest.fixture(scope="module")
def fast(small: nn.Module) -> CompiledNetwork:
    return bqnn.compile(small, X)


X = images(2, 6, 3)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        pytest.param(models.lenet5, images(1, 28), id="lenet5"),
        pytest.param(models.resnet20, images(3, 32), id="resnet20"),
        pytest.param(lambda: models.vgg7(image_size=16), images(3, 16), id="vgg7"),
        pytest.param(lambda: models.densenet(depth=22), images(3, 32), id="densenet"),
        pytest.param(models.airbench, images(3, 32), id="airbench"),
    ],
)
def test_built_in_networks_run_in_the_engine_alone(build: Callable[[], nn.Module], x: Tensor) -> None:
    fast = compiled(packed(build()), x)
    assert len(fast.parts) == 1
    assert not reasons(fast)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(torchvision.models.alexnet, 64, id="alexnet"),
        pytest.param(torchvision.models.squeezenet1_1, 32, id="squeezenet1_1"),
        pytest.param(lambda: torchvision.models.googlenet(init_weights=False), 32, id="googlenet"),
        pytest.param(torchvision.models.efficientnet_b0, 32, id="efficientnet_b0"),
        pytest.param(torchvision.models.resnet18, 32, id="resnet18"),
        pytest.param(torchvision.models.mobilenet_v3_small, 32, id="mobilenet_v3_small"),
    ],
)
def test_torchvisions_convolutional_networks_need_no_torch(build: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    net = build()
    fast = compiled(randomized(net), images(3, size))
    assert len(fast.parts) == 1
    assert not reasons(fast)


@pytest.mark.parametrize(
    ("build", "size", "torchs"),
    [
        pytest.param(
            lambda: torchvision.models.ConvNeXt([BlockConfig(8, 16, 1), BlockConfig(16, None, 1)]),
            16,
            {"aten.permute", "aten.layer_norm"},
            id="convnext",
        ),
        pytest.param(
            lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4]),
            32,
            {"aten.layer_norm", "aten.matmul"},
            id="swin",
        ),
        pytest.param(
            lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32),
            32,
            {"aten.layer_norm", "aten.scaled_dot_product_attention"},
            id="vit",
        ),
    ],
)
def test_networks_with_other_operators_run_in_parts(
    build: Callable[[], nn.Module], size: int, torchs: set[str]
) -> None:
    torch.manual_seed(0)
    net = build()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)  # some heads are made of zeros
    fast = compiled(packed(net), images(3, size))
    assert torchs <= set(reasons(fast))
    assert "conv2d" in ops(fast)


def test_an_example_of_one_image_or_a_tuple(small: nn.Module) -> None:
    for example in (X[:1], (X,), X[:1].to(torch.float64), (X * 255).to(torch.uint8)):
        fast = bqnn.compile(small, example)
        torch.testing.assert_close(fast(X), small(X))


def test_several_inputs() -> None:
    function = Function(lambda x, y: {"sum": x + y, "rows": y.flatten(1)})
    compiled(function, X, X + 1)
    fast = bqnn.compile(function, (X, X))
    with pytest.raises(TypeError, match="the network takes 2 inputs, .*, got 1"):
        fast(X)
    with pytest.raises(ValueError, match="must have 3 images, as the first input, got 2"):
        fast(X, X[:2])


def test_inputs_of_integers_are_torchs() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.words(words).mean(1))

    words = torch.tensor([[1, 2, 8], [0, 0, 1]])
    fast = compiled(Words(), words)
    assert ops(fast) == ["linear"]
    with pytest.raises(TypeError, match="words must be torch.int64, as in the example, got torch.float32"):
        fast(words.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_outputs_have_the_dtype_of_floating_inputs(dtype: torch.dtype, fast: CompiledNetwork) -> None:
    x = (X.abs() * 50).to(dtype)
    y = fast(x)
    assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert torch.equal(y, fast(x.float()).to(y.dtype))


def test_inputs_of_any_strides(fast: CompiledNetwork) -> None:
    wide = torch.randn(3, 4, 6, 12)
    for x in (X.contiguous(memory_format=torch.channels_last), wide[:, ::2, :, ::2], X[:1].expand(4, -1, -1, -1)):
        torch.testing.assert_close(fast(x), fast(x.clone(memory_format=torch.contiguous_format)))
    assert fast(X[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        pytest.param(
            X[:, :, 1:], ValueError, r"input must have the shape \[batch, 2, 6, 6\], got \[3, 2, 5, 6\]", id="size"
        ),
        pytest.param(X[0], ValueError, r"input must have the shape .*, got \[2, 6, 6\]", id="no-batch"),
        pytest.param(torch.tensor(1.0), ValueError, r"must have the shape .*, got \[\]", id="number"),
        pytest.param(X.long(), TypeError, "input must be floating point or uint8, got torch.int64", id="int64"),
        pytest.param(X.to(torch.complex64), TypeError, "floating point or uint8, got torch.complex64", id="complex"),
        pytest.param(X.to("meta"), ValueError, "input must be on the CPU, .* got one on meta", id="meta"),
        pytest.param([1], TypeError, "input must be a tensor, got list", id="list"),
        pytest.param(X.to_sparse(), TypeError, "input must be a dense tensor", id="sparse"),
        pytest.param(
            torch.nested.nested_tensor([X[0], X[1]]), TypeError, "must be a dense tensor, got one that", id="nested"
        ),
    ],
)
def test_a_wrong_input_is_named(x: Any, error: type[Exception], message: str, fast: CompiledNetwork) -> None:
    with pytest.raises(error, match=message):
        fast(x)


def test_hooks_see_every_call(small: nn.Module) -> None:
    fast = bqnn.compile(small, X)
    expected = fast(X)
    for _ in range(2):  # the first call prepares what the second one goes past the checks with
        assert torch.equal(fast(X), expected) and torch.equal(fast.forward(X), expected)
    seen: list[Any] = []
    handles = [
        fast.register_forward_pre_hook(lambda module, inputs: seen.append(inputs)),
        fast.register_forward_hook(lambda module, inputs, output: output + 1),
        nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output)),
    ]
    try:
        assert torch.equal(fast(X), expected + 1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    assert torch.equal(fast(X), expected) and len(seen) == 2


def test_gradients_are_refused_where_they_would_be_recorded(fast: CompiledNetwork) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        fast(x)
    with torch.no_grad():
        assert not fast(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(fast(X), fast(X.clone()))


def test_it_stays_where_it_is(fast: CompiledNetwork) -> None:
    before = fast(X)
    assert fast.eval() is fast and fast.train() is fast and not fast.training
    assert fast.to("cpu").float() is fast
    for cast in (fast.double, fast.half):
        with pytest.raises(RuntimeError, match="a compiled network has the precision that it was compiled for"):
            cast()
    with pytest.raises(RuntimeError, match="a compiled network runs on the CPU or a GPU, not on meta"):
        fast.to("meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="a compiled network can not be moved there"):
            fast.cuda()
    assert not list(fast.parameters()) and not fast.state_dict()
    assert torch.equal(fast(X), before)


def test_inputs_by_name() -> None:
    class Difference(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return nn.functional.linear(left - 2 * right, torch.ones(4, 6))

    a, b = X[:, 0, 0], X[:, 1, 1]
    fast = bqnn.compile(Difference(), (a, b))
    expected = fast(a, b)
    assert torch.equal(fast(left=a, right=b), expected) and torch.equal(fast(a, right=b), expected)
    assert torch.equal(fast(right=b, left=a), expected)
    with pytest.raises(TypeError, match="the network takes the inputs left, right, each once, got 'up'"):
        fast(a, up=b)
    with pytest.raises(TypeError, match="the network takes the inputs left, right, each once, got 'left'"):
        fast(a, left=b)
    with pytest.raises(TypeError, match="the network takes 2 inputs, left, right, got 0"):
        fast(right=b)


def test_other_defaults_of_torch(small: nn.Module, fast: CompiledNetwork) -> None:
    expected = fast(X)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(bqnn.compile(small, X)(X), expected)
        assert torch.equal(fast.to(torch.float32)(X), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(bqnn.compile(small, X)(X), expected)


def test_autocast_does_not_reach_inside(small: nn.Module, fast: CompiledNetwork) -> None:
    expected = fast(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(X), expected)
        assert torch.equal(bqnn.compile(small, X)(X), expected)


def test_copies_and_pickles(fast: CompiledNetwork) -> None:
    expected = fast(X)
    for twin in (copy.deepcopy(fast), copy.copy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(X), expected)
        assert str(twin) == str(fast)


def test_threads_share_one(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, made = bqnn.compile(small, X), []
    executor = module.executor
    monkeypatch.setattr(module, "executor", lambda *given: made.append(given) or executor(*given))
    inputs = [torch.randn(size, 2, 6, 6) for size in range(1, 17)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fast, inputs))
    assert len(made) == 1
    for x, y in zip(inputs, found):
        torch.testing.assert_close(y, small(x))


def test_print(fast: CompiledNetwork) -> None:
    assert str(fast).splitlines() == [
        "CompiledNetwork, fp32",
        "  input input [batch, 2, 6, 6]",
        "part 0, the engine",
        "  batch_norm     conv2d      [4, 4, 4]  float32  relu",
        "  max_pool2d     max_pool2d  [4, 2, 2]  float32",
        "  packed_linear  linear      [3]        float32",
    ]
    mixed = str(bqnn.compile(Function(lambda x: x.roll(1, 2).clamp(-1, 2)), X))
    assert "part 0, torch\n  roll   aten.roll.default   the engine has no such operator" in mixed


def test_bf16_and_int8_are_near(small: nn.Module, fast: CompiledNetwork) -> None:
    expected = small(X)
    scale = expected.abs().max()
    assert (bqnn.compile(small, X, precision="bf16")(X) - expected).abs().max() < 0.02 * scale
    quantized = bqnn.compile(small, X, precision="int8", calibration=[X[:2], (X[2:],)])
    assert (quantized(X) - expected).abs().max() < 0.1 * scale
    assert any(value.dtype == "uint8" for value in quantized.parts[0].graph.values.values())
    assert "int8" in str(quantized)


def test_int8_of_a_network_in_parts(small: nn.Module) -> None:
    net = Function(lambda x: nn.functional.conv2d(small[:4](x).roll(1, 2), torch.ones(2, 4, 2, 2)))
    x = images(2, 10, 8)
    fast = bqnn.compile(net, x, precision="int8", calibration=iter([x]))
    assert len(fast.parts) == 3
    assert (fast(x) - net(x)).abs().max() < 0.1 * net(x).abs().max()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        pytest.param((nn.ReLU, X), {}, TypeError, "net must be a torch.nn.Module, got type", id="a-class"),
        pytest.param(
            (nn.ReLU(), 3), {}, TypeError, "example must be a tensor or a tuple of tensors, got int", id="int"
        ),
        pytest.param((nn.ReLU(), ()), {}, TypeError, "example must be a tensor", id="no-inputs"),
        pytest.param((nn.ReLU(), X[:0]), {}, ValueError, "example must have one batch of 1 or more", id="no-images"),
        pytest.param((nn.ReLU(), torch.tensor(1.0)), {}, ValueError, "example must have one batch", id="a-number"),
        pytest.param((nn.ReLU(), (X, X[:1])), {}, ValueError, "example must have one batch", id="two-batches"),
        pytest.param((nn.ReLU(), X.to("meta")), {}, ValueError, "must be on the CPU", id="meta"),
        pytest.param((nn.Linear(6, 6, device="meta"), X), {}, ValueError, "must be on the CPU", id="meta-net"),
        pytest.param((nn.ReLU(), X), {"precision": "fp8"}, ValueError, "precision must be one of", id="precision"),
        pytest.param((nn.ReLU(), X), {"precision": "int8"}, ValueError, "calibration must be batches", id="int8"),
        pytest.param((nn.ReLU(), X), {"calibration": [X]}, ValueError, "calibration must be batches", id="calibrated"),
        pytest.param(
            (nn.ReLU(), X), {"precision": "int8", "calibration": X}, TypeError, "got a single tensor", id="one-tensor"
        ),
        pytest.param(
            (nn.ReLU(), X),
            {"precision": "int8", "calibration": [X, X[:, :1]]},
            ValueError,
            "calibration batch 1: input must have the shape",
            id="calibration-shape",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bqnn.compile(*arguments, **options)
