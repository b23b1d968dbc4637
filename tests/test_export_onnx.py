"""export_onnx: what ONNX Runtime computes from the file, and that the weights in it are codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bqnn
from tests.support.odd_nets import FunctionalConvolution, TiedEmbedding

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def make(net: nn.Module, num_levels: int = 3, **options: Any) -> Any:
    return bqnn.pack(bqnn.convert(net.eval(), num_levels, **options))


def session(path: Path, optimized: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    opened = session(path)
    names = [each.name for each in opened.get_inputs()]
    return [torch.from_numpy(each) for each in opened.run(None, {n: x.numpy() for n, x in zip(names, inputs)})]


def check(net: nn.Module, path: Path, *inputs: Tensor) -> None:
    """The file gives for any batch what the network gives."""
    bqnn.export_onnx(net, path, inputs)
    for batch in (tuple(x[:1] for x in inputs), tuple(torch.cat([x] * 3) for x in inputs)):
        with torch.no_grad():
            expected = net(*batch)
        (found,) = run(path, *batch)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * expected.abs().max().item())


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def images(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def digits(number: int) -> Tensor:
    """Handwritten digits [number, 1, 28, 28], pixels from -1 to 1."""
    pixels = torch.tensor(load_digits().images[:number], dtype=torch.float32).unsqueeze(1)
    return F.interpolate(pixels / 8 - 1, size=28, mode="bilinear")


def test_lenet5_is_an_eighth_and_gives_the_same_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fpnn = bqnn.models.lenet5().eval()
    net, x = make(fpnn), digits(1000)
    path, full = tmp_path / "net.onnx", tmp_path / "full.onnx"
    bqnn.export_onnx(net, path, x)
    (found,) = run(path, x)
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.onnx.export(fpnn, (x[:2],), full, dynamo=True, external_data=False, verbose=False)
    assert path.stat().st_size <= full.stat().st_size / 8
    opened = session(path, tmp_path / "optimized.onnx")
    assert [each.name for each in opened.get_inputs()] == ["x"]
    assert [(each.name, each.shape) for each in opened.get_outputs()] == [("output", ["batch", 10])]
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not operators & {"Gather", "Cast", "Slice"}, "weights are decoded in every call"


@pytest.mark.parametrize(("num_levels", "granularity"), [(2, "tensor"), (5, "channel")])
def test_weights_are_codes(num_levels: int, granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(num_levels)
    layers = nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 7, bias=False)
    net, path = make(nn.Sequential(*layers), num_levels, granularity=granularity), tmp_path / "net.onnx"
    check(net, path, images(2, 3, 5, 5))
    found = stored(path)
    for name in ("0", "3"):
        assert np.array_equal(found[f"{name}.weight.codes"], net.get_submodule(name).codes.numpy())
        assert np.array_equal(found[f"{name}.weight.levels"].ravel(), net.get_submodule(name).levels.numpy().ravel())
    assert not {name for name in found if name.endswith(".weight")}


@pytest.mark.parametrize("kind", [TiedEmbedding, FunctionalConvolution])
def test_tied_weights_and_those_that_are_read_past_the_layer(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = make(kind())
    check(net, tmp_path / "net.onnx", kind.example())
    codes = [name for name in stored(tmp_path / "net.onnx") if name.endswith(".codes")]
    assert len(codes) == len({id(each.codes) for each in net.modules() if hasattr(each, "codes")})


class TwoWays(nn.Module):
    """Two inputs, two outputs, a layer at full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.plain = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.a(left) + self.b(right)
        return self.plain(joined), joined


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = bqnn.convert(TwoWays(), 3, skip=["plain"]).eval(), tmp_path / "net.onnx"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs = images(3, 4), images(3, 5)
    bqnn.export_onnx(net, path, inputs)
    opened = session(path)
    assert [each.name for each in opened.get_inputs()] == ["left", "right"]
    assert [each.name for each in opened.get_outputs()] == ["output_0", "output_1"]
    for found, expected in zip(run(path, *inputs), net(*inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(stored(path)["plain.weight"], net.plain.weight.detach().numpy())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    net, path = make(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))).half(), tmp_path / "net.onnx"
    x = images(4, 6).half()
    bqnn.export_onnx(net, path, x)
    (found,) = run(path, x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, net(x), rtol=1e-2, atol=1e-2)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_a_file_that_can_not_be_made_leaves_what_was_there(tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", make(nn.Sequential(nn.Linear(4, 2)))
    path.write_text("before")

    with pytest.raises(ValueError, match="net must be such that torch.export captures it"):
        bqnn.export_onnx(make(Asks()), path, images(2, 4))
    for wrong, message in (((), "example must be a tensor"), (images(0, 4), "example must have one batch")):
        with pytest.raises((TypeError, ValueError), match=message):
            bqnn.export_onnx(net, path, wrong)
    with pytest.raises(ValueError, match="net must have packed or Bayes layers"):
        bqnn.export_onnx(nn.Linear(4, 2), path, images(2, 4))
    assert path.read_text() == "before" and [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match="onnx is not installed: pip install 'bqnn\\[onnx\\]'"):
        bqnn.export_onnx(make(nn.Sequential(nn.Linear(4, 2))), tmp_path / "net.onnx", images(2, 4))
