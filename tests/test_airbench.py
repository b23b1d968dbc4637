"""Airbench's network: what its first layer does to images, and that it trains, resumes and packs as others do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn import models
from bqnn.bayes.layers import bayes_layers
from bqnn.lab import runs
from bqnn.lab.folder import WEIGHTS
from bqnn.lab.recipes import load_recipe
from bqnn.lab.train import Trainer
from bqnn.models.airbench import Airbench

# The recipe on 20 images.
SMALL = replace(
    load_recipe("airbench-cifar10"),
    dataset="digits",
    image_size=9,
    validation=1417,
    batch_size=10,
    pretrain_epochs=2,
    deterministic_epochs=0,
    epochs=1,
)


def silent(line: str) -> None:
    pass


def natural(count: int, channels: int = 3, size: int = 12) -> Tensor:
    """Images whose neighbouring pixels, and channels, are alike: [count, channels, size, size]."""
    noise = torch.randn(count, channels + 1, size + 4, size + 4, generator=torch.Generator().manual_seed(2))
    smooth = F.avg_pool2d(noise, 5, 1)
    return 3 * smooth[:, :1] + smooth[:, 1:]


@pytest.fixture(scope="module")
def net() -> Airbench:
    torch.manual_seed(0)
    made = models.airbench(image_size=12)
    made.initialise(natural(400).split(100))
    return made


def test_the_first_layer_whitens_patches(net: Airbench) -> None:
    filters = net.whiten.weight.double().flatten(1)
    assert torch.equal(filters[12:], -filters[:12])
    patches = F.unfold(natural(400), 2).transpose(1, 2).flatten(0, 1).double()
    moment = patches.T @ patches / len(patches)
    whitened = filters[:12] @ moment @ filters[:12].T
    # In each direction the variance v becomes v / (v + 5e-4).
    variances = torch.linalg.eigvalsh(moment)
    torch.testing.assert_close(whitened, torch.diag(variances / (variances + 5e-4)), rtol=0, atol=1e-4)
    assert not net.whiten.bias.any() and not net.whiten.weight.requires_grad


def test_no_more_images_are_read_than_whitening_takes() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for index in range(100):
            read.append(index)
            yield natural(2)

    models.airbench(image_size=12).initialise(batches())
    assert len(read) == 10
    models.lenet5().initialise(batches())
    assert len(read) == 10, "a network that is made of no images reads none"
    with pytest.raises(ValueError, match="batches must hold at least one image, got none"):
        models.airbench().initialise([])


def test_groups_start_as_copies_of_their_input() -> None:
    x = torch.randn(2, 64, 5, 5, generator=torch.Generator().manual_seed(0))
    group = models.airbench().group2
    torch.testing.assert_close(group.conv1(x)[:, :64], x, rtol=0, atol=1e-6)
    y = torch.randn(2, 256, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(group.conv2(y), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_levels", [2, 3, 4, 16])
def test_each_whitening_filter_has_a_codebook_of_its_size(net: Airbench, num_levels: int) -> None:
    state = net.state_dict()
    copied = models.airbench(image_size=12)
    copied.load_state_dict(state)
    bayes = bqnn.convert(copied, num_levels, granularity="channel", skip=["group1", "group2", "group3", "fc"])
    exact, quantized = state["whiten.weight"].flatten(1), bayes.whiten.quantized_weight().flatten(1)
    error = (exact - quantized).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < {2: 0.9, 3: 0.6, 4: 0.45, 16: 0.01}[num_levels]
    assert (quantized.amax(1) > quantized.amin(1)).all(), "no filter is constant"
    frozen = {name for name, parameter in bayes.named_parameters() if not parameter.requires_grad}
    assert {"whiten.weight", "whiten.raw_levels"} <= frozen and not any("group" in name for name in frozen)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe, whose whitening layer was looked at after every epoch."""
    trainer = Trainer(SMALL, tmp_path_factory.mktemp("airbench"))
    before, changed = trainer.net.whiten.weight.clone(), []
    trainer.run(progress=False, log=lambda _: changed.append(not torch.equal(mean_of(trainer.net), before)))
    assert changed == [False, False, True], "frozen at full precision, and learned when it is quantized"
    assert torch.equal(before[4:], -before[:4]) and len(bayes_layers(trainer.net)) == 8
    return trainer.folder


def mean_of(net: nn.Module) -> Tensor:
    layer = net.get_submodule("whiten")
    return layer.mean if isinstance(layer, bqnn.BayesConv2d) else layer.weight


def test_a_run_is_resumed_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(SMALL, tmp_path).run(progress=False, log=stop)
    trainer = Trainer(SMALL, tmp_path)
    assert trainer.resume(silent) and trainer.epoch == 1
    trainer.run(progress=False, log=silent)
    assert (tmp_path / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_run_packs_into_a_file_that_needs_no_class(run: Path, tmp_path: Path) -> None:
    net, file = runs.load_network(runs.load_run(run)), tmp_path / "packed.safetensors"
    runs.save_packed(net, file)
    packed = bqnn.load(file)
    assert packed.factory == ("airbench", {"in_channels": 1, "num_classes": 10, "image_size": 9})
    x = torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-5)
