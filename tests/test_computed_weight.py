"""The weight of a quantized layer, read and written past its forward pass."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import bqnn
from bqnn import BayesConv2d, BayesLinear
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.core.computed_weight import ComputedWeight
from bqnn.engine.pack import pack_layer


def make(kind: str = "linear", **options: Any) -> Any:
    torch.manual_seed(0)
    return BayesLinear(5, 4, **options) if kind == "linear" else BayesConv2d(4, 6, (3, 2), groups=2, **options)


KINDS = ["linear", "conv2d"]
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_it_is_the_quantized_weight(kind: str) -> None:
    layer = make(kind).eval()
    for quantized, weight in ((layer, layer.weight), (layer, pack_layer(layer).weight)):
        value = quantized.quantized_weight()
        assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.dtype, weight.device) == (value.shape, value.dtype, value.device)
        assert (len(weight), weight.numel(), weight.dim()) == (len(value), value.numel(), value.dim())
        assert (weight.size(0), weight.stride(), weight.is_contiguous()) == (len(value), value.stride(), True)
        for read in (lambda w: w.clone(), lambda w: w + 0, lambda w: w.data.clone(), lambda w: w.detach() * 1):
            assert type(read(weight)) is Tensor
            assert torch.equal(read(weight), value)
        assert torch.equal(weight.flatten(1).T @ torch.ones(len(value)), value.flatten(1).T @ torch.ones(len(value)))
        assert torch.equal(torch.stack([*weight]), value)
        assert weight.tolist() == value.tolist()
        assert repr(weight) == repr(value)


def test_functions_of_it_are_the_layer() -> None:
    linear, conv = make().eval(), make("conv2d").eval()
    x, image = torch.randn(3, 5), torch.randn(2, 4, 6, 6)
    assert torch.equal(F.linear(x, linear.weight, linear.bias), linear(x))
    assert torch.equal(F.conv2d(image, conv.weight, conv.bias, groups=2), conv(image))
    for packed, y in ((pack_layer(linear), linear(x)), (pack_layer(conv), conv(image))):
        if y.dim() == 2:
            torch.testing.assert_close(F.linear(x, packed.weight, packed.bias), y)
        else:
            torch.testing.assert_close(F.conv2d(image, packed.weight, packed.bias, groups=2), y)


def test_it_is_one_object_and_follows_the_layer() -> None:
    layer = make().eval()
    weight = layer.weight
    assert weight is layer.weight
    layer.set_levels_(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert torch.equal(weight.clone(), layer.quantized_weight())
    layer.double()
    assert weight.dtype == torch.float64
    assert torch.equal(weight.clone(), layer.quantized_weight())
    with torch.no_grad():
        layer.mean.neg_()
    assert torch.equal(weight.clone(), layer.quantized_weight())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_training_it_is_distributed_as_the_product(estimator: str) -> None:
    layer = make(estimator=estimator, num_levels=4)
    with torch.no_grad():
        layer.log_sigma2.add_(3.0)
        layer.bias.zero_()
    samples = 4096
    with torch.no_grad():
        own = torch.stack([layer(X[0]) for _ in range(samples)])
        read = torch.stack([F.linear(X[0], layer.weight) for _ in range(samples)])
    assert own.std(0).max() > 0.0 or estimator == "deterministic"
    deviation = own.std(0) / samples**0.5
    assert ((own.mean(0) - read.mean(0)).abs() <= 6.0 * deviation * 2**0.5 + 1e-6).all()
    torch.testing.assert_close(read.std(0), own.std(0), rtol=0.08, atol=1e-6)


@pytest.mark.parametrize("estimator", ["sample", "deterministic"])
def test_its_gradients_are_those_of_the_product(estimator: str) -> None:
    """With an identity for x the product is the sample itself."""
    layer = make(estimator=estimator)
    grad = torch.randn(5, 4)
    parameters = [layer.mean, layer.raw_levels, *([layer.log_sigma2] if estimator == "sample" else [])]
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(torch.eye(5)), parameters, grad)
    torch.manual_seed(3)
    found = torch.autograd.grad(F.linear(torch.eye(5), layer.weight, layer.bias), parameters, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(a.abs().sum() > 0 for a in found)


def test_one_operation_sees_one_sample_and_another_a_new_one() -> None:
    layer = make()
    with torch.no_grad():
        layer.log_sigma2.add_(5.0)
    assert (layer.weight - layer.weight).abs().sum() == 0
    assert not torch.equal(layer.weight.detach() + 0, layer.weight.detach() + 0)
    layer.eval()
    assert torch.equal(layer.weight + 0, layer.weight + 0)
    with bqnn.sampling(layer):
        assert not torch.equal(layer.weight + 0, layer.weight + 0)


def test_questions_draw_no_random_numbers() -> None:
    weight = make().weight
    state = torch.get_rng_state()
    _ = weight.shape, weight.dtype, weight.device, weight.requires_grad, weight.grad, weight.is_leaf, len(weight)
    _ = weight.T, weight[0], weight.data, weight.detach().view(-1), weight.stride(), weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), state)


WRITES: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("mul_", lambda w: w.mul_(-2.0)),
    ("imul", lambda w: w.__imul__(-2.0)),
    ("copy_", lambda w: w.copy_(torch.arange(20.0).view(4, 5))),
    ("data", lambda w: w.data.mul_(3.0)),
    ("data-setitem", lambda w: w.data.__setitem__(slice(1, 3), 7.0)),
    ("setitem", lambda w: w.__setitem__((0, 2), 7.0)),
    ("detach", lambda w: w.detach().zero_()),
    ("transposed", lambda w: w.T[1].fill_(4.0)),
    ("view", lambda w: w.view(-1)[3:9].add_(1.0)),
    ("flatten", lambda w: w.flatten().neg_()),
    ("rows", lambda w: [row.fill_(i) for i, row in enumerate(w)]),
    ("chunk", lambda w: w.chunk(2)[1].fill_(2.0)),
    ("unbind", lambda w: w.unbind(1)[2].fill_(2.0)),
    ("out", lambda w: torch.add(torch.ones(4, 5), 1.0, out=w)),
    ("foreach", lambda w: torch._foreach_mul_([w], 3.0)),
    ("normal", lambda w: nn.init.normal_(w)),
    ("xavier", lambda w: nn.init.xavier_uniform_(w)),
    ("kaiming", lambda w: nn.init.kaiming_normal_(w)),
    ("orthogonal", lambda w: nn.init.orthogonal_(w)),
    ("trunc", lambda w: nn.init.trunc_normal_(w, std=0.02)),
    ("lerp", lambda w: w.lerp_(torch.ones(4, 5), 0.25)),
    ("data-set", lambda w: setattr(w, "data", torch.ones(4, 5))),
]


@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in WRITES])
def test_writes_reach_the_means(write: Callable[[Tensor], Any]) -> None:
    layer = make().eval()
    twin = nn.Parameter(layer.mean.detach().clone())
    before = layer.mean.detach().clone()
    with torch.no_grad():
        torch.manual_seed(5)
        write(layer.weight)
        torch.manual_seed(5)
        write(twin)
    assert not torch.equal(layer.mean, before)
    assert torch.equal(layer.mean, twin)
    assert torch.equal(layer.weight.clone(), layer.quantized_weight())


@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in WRITES])
def test_a_packed_weight_can_not_be_written(write: Callable[[Tensor], Any]) -> None:
    packed = pack_layer(make())
    before = packed.decode()
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight of a PackedLinear .* can not be changed"):
        write(packed.weight)
    assert torch.equal(packed.weight.clone(), before)
    packed.weight.detach().numpy()[:] = 7.0  # an array of its own
    assert torch.equal(packed.weight.clone(), before)


def test_a_write_with_gradients_on_is_refused_as_of_any_parameter() -> None:
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        make().weight.mul_(2.0)


def test_what_is_refused() -> None:
    layer = make()
    with pytest.raises(TypeError, match="weight of a BayesLinear is computed .* can not be assigned"):
        layer.weight = nn.Parameter(torch.zeros(4, 5))
    with pytest.raises(TypeError, match="can not be deleted"):
        del layer.weight
    with pytest.raises(ValueError, match=r"weight.data must stay torch.float32 of the shape \[4, 5\]"):
        layer.weight.data = torch.zeros(5)
    with pytest.raises(TypeError, match=r"mean must be an nn.Parameter of the shape \[4, 5\], got Tensor"):
        layer.mean = torch.zeros(4, 5)
    with pytest.raises(TypeError, match="cannot assign"):
        nn.Linear(5, 4).weight = layer.weight
    with pytest.raises(RuntimeError, match="Parameter"):
        nn.Parameter(layer.weight)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(parametrizations.weight_norm, id="weight_norm"),
        pytest.param(parametrizations.spectral_norm, id="spectral_norm"),
        pytest.param(parametrizations.orthogonal, id="orthogonal"),
        pytest.param(lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()), id="any"),
        pytest.param(nn.utils.spectral_norm, id="old-spectral_norm"),
        pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), id="prune"),
        pytest.param(lambda layer: prune.identity(layer, "weight"), id="prune-identity"),
    ],
)
def test_utilities_that_would_replace_the_parameter_fail_and_change_nothing(change: Callable[[Any], Any]) -> None:
    layer = make().eval()
    expected, names = layer(X), [name for name, _ in layer.named_parameters()]
    with pytest.raises((TypeError, RuntimeError)):
        change(layer)
    assert [name for name, _ in layer.named_parameters()] == names
    assert torch.equal(layer(X), expected)


def test_fusing_a_batchnorm_fails() -> None:
    conv, norm = BayesConv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    with pytest.raises(TypeError, match="weight of a BayesConv2d is computed"):
        fusion.fuse_conv_bn_eval(conv, norm)
    linear, norm1d = make().eval(), nn.BatchNorm1d(4).eval()
    with pytest.raises(TypeError, match="weight of a BayesLinear is computed"):
        fusion.fuse_linear_bn_eval(linear, norm1d)


def test_freezing_the_weight_freezes_all_that_it_is_computed_from() -> None:
    layer = make(partition="learned")
    posterior = {"weight", "log_sigma2", "raw_levels", "raw_thresholds"}

    def learning() -> set[str]:
        return {name for name, parameter in layer.named_parameters() if parameter.requires_grad}

    layer.weight.requires_grad_(False)
    assert learning() == {"bias"} and not layer.weight.requires_grad
    layer.weight.requires_grad = True
    assert learning() == posterior | {"bias"} and layer.weight.requires_grad


def test_gradients_are_read_and_set() -> None:
    layer = make()
    F.linear(X, layer.weight).sum().backward()
    assert layer.weight.grad is layer.mean.grad is not None
    layer.weight.grad = None
    assert layer.mean.grad is None


def test_copies_and_pickles() -> None:
    net = nn.Module()
    net.layer = make().eval()
    net.held = [net.layer.weight, net.layer.weight.T]
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.layer.mean.zero_()
    assert torch.equal(copied.held[0].clone(), copied.layer.quantized_weight())
    assert torch.equal(copied.held[1].clone(), copied.layer.quantized_weight().T)
    assert torch.equal(net.held[0].clone(), net.layer.quantized_weight())
    read = pickle.loads(pickle.dumps(net.layer.weight))
    assert type(read) is Tensor and torch.equal(read, net.layer.quantized_weight())
    buffer = io.BytesIO()
    torch.save(net.layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).mean, net.layer.mean)
    assert copy.copy(net.layer).mean is net.layer.mean


def test_compile_and_export_see_plain_tensors() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.to(self.fc.weight.dtype), self.fc.weight, self.fc.bias) + x @ self.fc.weight.T

    torch.manual_seed(0)
    net = bqnn.convert(Reading()).eval()
    for each in (net, bqnn.pack(net)):
        expected = each(X)
        compiled = torch.compile(copy.deepcopy(each), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected)
        torch.testing.assert_close(torch.export.export(each, (X,)).module()(X), expected)


def test_no_operation_gets_the_means_by_a_back_door() -> None:
    layer: BayesLayer = make().eval()
    weight = layer.weight
    assert isinstance(weight, ComputedWeight)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="has no memory of its own"):
        weight.clone()


def test_state_dicts_name_the_means_as_before() -> None:
    layer = make()
    assert list(layer.state_dict()) == ["weight", "bias", "log_sigma2", "raw_levels", "level_scale", "prior_sigma2"]
    assert torch.equal(layer.state_dict()["weight"], layer.mean)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "log_sigma2", "raw_levels"]
    other = BayesLinear(5, 4)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.mean, layer.mean) and torch.equal(other.levels, layer.levels)
    plain = nn.Linear(5, 4)
    other.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(other.mean, plain.weight)
    swapped = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    assert torch.equal(torch.func.functional_call(other.eval(), swapped, (X,)), layer(X))
