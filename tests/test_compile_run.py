"""The compiled networks beside a packed file: their names, what they are calibrated on, and why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.files import FormatError
from bqnn.data.splits import load_dataset, normalise
from bqnn.lab.compile_run import calibration, compiled_path, load_compiled, remove_compiled, save_compiled
from tests.support.compiled import packed

X = torch.ones(2, 3, 4, 4)


def test_names() -> None:
    assert compiled_path(Path("a/m3.safetensors"), "int8") == Path("a/m3.compiled-int8.safetensors")
    assert compiled_path(Path("a/net.v2"), "fp32") == Path("a/net.v2.compiled-fp32.safetensors")


def test_calibration_images_are_drawn_and_the_same_again() -> None:
    data = load_dataset("digits")
    images = calibration(data)
    assert [tuple(batch.shape) for batch in images] == [(128, 1, 8, 8)] * 4
    assert all(map(torch.equal, images, calibration(data)))
    assert abs(float(torch.cat(images).mean())) < 0.1, "normalised"
    firsts = normalise(data.train.images[:512], data.mean, data.std)
    assert not torch.equal(torch.cat(images), firsts), "not the first ones, which may be of one class"


def test_what_is_saved_is_found_and_removed(tmp_path: Path) -> None:
    net, file = packed(nn.Sequential(nn.Flatten(), nn.Linear(48, 3))), tmp_path / "net.safetensors"
    saved = save_compiled(net, file, X, lambda: [X])
    found = load_compiled(file)
    assert list(saved) == list(found) == ["fp32", "int8"]
    for precision, fast in saved.items():
        assert isinstance(fast, bqnn.CompiledNetwork) and fast.precision == precision
        assert torch.equal(found[precision](X), fast(X))
    compiled_path(file, "fp32").write_bytes(b"x" * 100)
    with pytest.raises(FormatError, match="net.compiled-fp32"):
        load_compiled(file)
    remove_compiled(file)
    assert load_compiled(file) == {} and list(tmp_path.iterdir()) == []


class Looks(nn.Module):
    """It can not be captured with a batch of any size."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Sums(nn.Module):
    """Torch runs a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


@pytest.mark.parametrize(("net", "why"), [(Looks(), "torch.export"), (Sums(), "cumsum")], ids=["captured", "torch"])
def test_what_can_not_be_compiled_into_a_file_says_why_in_a_line(net: nn.Module, why: str, tmp_path: Path) -> None:
    left = compiled_path(tmp_path / "net.safetensors", "fp32")
    left.write_bytes(b"of an earlier network")
    found = save_compiled(net.eval(), tmp_path / "net.safetensors", X, lambda: [X])
    assert list(found) == ["fp32", "int8"]
    for line in found.values():
        assert isinstance(line, str) and why in line and "\n" not in line
    assert list(tmp_path.iterdir()) == []
