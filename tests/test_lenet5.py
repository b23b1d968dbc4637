"""LeNet-5 on real images, end to end: short versions of what bench/accuracy_lenet5.py measures in full."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bqnn
from bqnn.bayes.convert import convert
from bqnn.data.splits import Splits, load_dataset, normalise
from bqnn.lab.evaluate import evaluate
from bqnn.lab.recipes import load_recipe
from bqnn.lab.train import Trainer
from bqnn.models import lenet5

DATA = Path(os.environ.get("BQNN_DATA", Path(__file__).parent.parent / "data"))


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def mnist() -> Splits:
    return load_dataset("mnist", DATA)


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST's first 21,000 training images, a thousand of them for validation, and all test images."""
    root = tmp_path_factory.mktemp("third")
    shutil.copytree(DATA / "MNIST" / "raw", root / "MNIST" / "raw")
    for name, head, size in (("train-images-idx3-ubyte", 16, 28 * 28), ("train-labels-idx1-ubyte", 8, 1)):
        path = root / "MNIST" / "raw" / name
        content = path.read_bytes()
        count = (21_000).to_bytes(4, "big")  # bytes 4 to 7 of the head
        path.write_bytes(content[:4] + count + content[8 : head + 21_000 * size])
    return root


def train(folder: Path, data_root: Path, **changes: object) -> Trainer:
    """One epoch of each phase, on a third of the images: the recipe in small."""
    recipe = replace(
        load_recipe("lenet5-mnist"), pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=1_000, **changes
    )
    trainer = Trainer(recipe, folder, data_root=data_root)
    trainer.run(progress=False, log=silent)
    return trainer


@pytest.fixture(scope="module")
def short_run(third: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(tmp_path_factory.mktemp("mnist"), third)


def test_one_epoch_of_each_phase_learns_mnist(short_run: Trainer) -> None:
    error = evaluate(short_run.net, short_run.data.test, short_run.data).error
    assert error <= 4.0
    near = bqnn.report(short_run.net).near_share
    assert near is not None and near >= 0.9


@pytest.mark.parametrize("num_levels", [2, 3, 4, 5, 8, 16], ids=lambda m: f"M{m}")
def test_packed_and_unpacked_agree_on_every_test_image(
    short_run: Trainer, mnist: Splits, tmp_path: Path, num_levels: int
) -> None:
    dense = lenet5()
    state = {name: t for name, t in short_run.net.state_dict().items() if name in dense.state_dict()}
    dense.load_state_dict(state)
    net = convert(dense, num_levels)
    images = (normalise(chunk, mnist.mean, mnist.std) for chunk in mnist.train.images.split(500))
    bqnn.refresh_batchnorm(net, images, limit=4)
    path = tmp_path / "packed.safetensors"
    bqnn.save(bqnn.pack(net), path)
    unpacked = evaluate(net, mnist.test, mnist)
    for execution in ("dense", "packed"):
        packed = evaluate(bqnn.load(path, execution=execution), mnist.test, mnist)
        assert torch.equal(packed.predictions, unpacked.predictions)
    assert unpacked.predictions.unique().numel() == 10


def test_packed_file_is_a_thirteenth_of_the_full_precision_file(short_run: Trainer, tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed.safetensors", tmp_path / "dense.safetensors"
    bqnn.save(bqnn.sample(bqnn.pack(short_run.net), seed=0), packed)
    save_file(lenet5().state_dict(), dense)
    assert packed.stat().st_size <= dense.stat().st_size / 13
    bqnn.save(bqnn.pack(short_run.net), tmp_path / "posterior")
    assert (tmp_path / "posterior").stat().st_size <= packed.stat().st_size + 5 * (36 + 81), "five layers' chances"
    assert bqnn.info(packed)["bytes"] == packed.stat().st_size


def test_spikes_gather_the_means_and_a_gaussian_prior_does_not(short_run: Trainer, third: Path, tmp_path: Path) -> None:
    """The published effect (Chien and Chang 2023): quantization loss under both priors, on the same schedule."""
    gaussian = train(tmp_path, third, prior="gaussian").history[-1]
    spikes = short_run.history[-1]
    assert spikes["near_share"] >= 0.9
    assert gaussian["near_share"] <= 0.6
    assert spikes["quantization_loss"] <= 0.2 * gaussian["quantization_loss"]
