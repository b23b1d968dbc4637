"""`bqnn predict`, and `bqnn eval` of files on images of one's own: class names, sizes, channels, normalization."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import Metadata, models
from bqnn.data.image_folder import read_images
from bqnn.data.splits import load_dataset, normalise
from bqnn.lab.folder import METADATA, WEIGHTS
from bqnn.lab.runs import load_metadata, load_run

Image = pytest.importorskip("PIL.Image")

CLASSES = ("ant", "bee", "cat")
KNOWN = Metadata("insects", CLASSES, 1, 8, (0.4,), (0.3,))
NO_EPOCHS = ["--pretrain-epochs", "0", "--deterministic-epochs", "0", "--epochs", "0", "--quiet"]


def make_packed(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    net = models.lenet5(image_size=8, num_classes=3, in_channels=options.pop("in_channels", 1))
    return bqnn.pack(bqnn.convert(net, start_sigma=1.0, **options))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, and a folder of images of its classes, in grey and in colour, of other sizes than 8 x 8."""
    folder = tmp_path_factory.mktemp("files")
    packed = make_packed(0)
    both = bqnn.Ensemble([packed, make_packed(1)])
    torch.manual_seed(0)
    nets = {"packed": packed, "ensemble": both, "bayes": bqnn.convert(models.lenet5(image_size=8, num_classes=3))}
    nets["compiled"] = bqnn.compile(packed, torch.zeros(2, 1, 8, 8))
    for name, net in nets.items():
        bqnn.save(net, folder / f"{name}.safetensors", KNOWN)
    random = np.random.default_rng(0)
    for name, size, suffix in (("bee", (12, 8, 3), "png"), ("cat", (8, 8), "png"), ("ant", (20, 30), "gif")):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.{suffix}")
    shutil.copytree(folder / "images", folder / "png", ignore=shutil.ignore_patterns("ant"))
    return folder


def images_of(paths: list[Path]) -> Tensor:
    return normalise(read_images(paths, 1, 8), KNOWN.mean or (), KNOWN.std or ())


@pytest.mark.parametrize("kind", ["packed", "compiled", "bayes"])
def test_classes_and_probabilities(kind: str, run: Any, files: Path) -> None:
    path = files / f"{kind}.safetensors"
    paths = [*sorted((files / "images/bee").iterdir()), files / "images/ant/1.gif"]
    result = run("predict", path, files / "images/bee", paths[-1], "--json")
    assert result.status == 0, result.err
    rows = json.loads(result.out)
    expected = bqnn.predict(bqnn.load(path), images_of(paths)).probs
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, probs in zip(rows, expected, strict=True):
        assert list(row) == ["image", "class", "probabilities"] and tuple(row["probabilities"]) == CLASSES
        assert list(row["probabilities"].values()) == pytest.approx(probs.tolist(), abs=1e-6)
        assert row["class"] == CLASSES[int(probs.argmax())]
    lines = run("predict", path, paths[0], "--top", 2).out.splitlines()
    best = expected[0].topk(2)
    shown = ", ".join(f"{CLASSES[i]} {100 * p:.2f} %" for p, i in zip(best.values, best.indices, strict=True))
    assert lines == [f"{paths[0]}: {shown}"]


def test_samples_and_ensembles_have_entropies(run: Any, files: Path) -> None:
    image = files / "images/cat/0.png"
    packed = files / "packed.safetensors"
    asked = ("predict", packed, image, "--samples", 4, "--seed", 7)
    (row,) = json.loads(run(*asked, "--json").out)
    found = bqnn.predict(bqnn.load(packed), images_of([image]), samples=4, seed=7)
    assert row["entropy"] == pytest.approx(found.entropy.item(), abs=1e-6)
    assert row["mutual_information"] == pytest.approx(found.mutual_information.item(), abs=1e-6)
    text = f"entropy {row['entropy']:.4f} nats  mutual information {row['mutual_information']:.4f} nats"
    assert run(*asked).out.endswith(f"%  {text}\n")
    (row,) = json.loads(run("predict", files / "ensemble.safetensors", image, "--json").out)
    found = bqnn.predict(bqnn.load(files / "ensemble.safetensors"), images_of([image]))
    assert row["mutual_information"] == pytest.approx(found.mutual_information.item(), abs=1e-6) and row["entropy"] > 0


def test_names_from_files_do_not_reach_the_terminal(run: Any, files: Path, tmp_path: Path) -> None:
    bqnn.save(make_packed(0), tmp_path / "net", Metadata(None, ("\x1b[2J", "\ud800", "c"), mean=(0.4,), std=(0.3,)))
    result = run("predict", tmp_path / "net", files / "images/cat/0.png")
    assert result.status == 0 and "\\x1b[2J" in result.out and "\x1b" not in result.out
    assert "\\x1b[2J" in run("info", tmp_path / "net").out


def test_predict_of_a_run_and_of_what_is_packed_of_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset("digits")
    assert run("train", "--out", tmp_path / "run", *NO_EPOCHS).status == 0
    assert run("pack", tmp_path / "run").status == 0
    known = bqnn.info(tmp_path / "run" / "packed.safetensors")["metadata"]
    assert known == Metadata("digits", tuple("0123456789"), 1, 8, data.mean, data.std)
    assert bqnn.info(tmp_path / "run" / "packed.compiled-int8.safetensors")["metadata"] == known
    Image.fromarray(data.test.images[0, 0].numpy()).save(tmp_path / "digit.bmp")
    results = [run("predict", tmp_path / "run" / name, tmp_path / "digit.bmp") for name in ("", "packed.safetensors")]
    assert [each.status for each in results] == [0, 0] and results[0].out == results[1].out

    without_data(tmp_path / "run")
    assert load_metadata(load_run(tmp_path / "run"), "data") == known, "of an older run its data set says it"
    monkeypatch.setattr("bqnn.lab.runs.load_data", missing)
    result = run("predict", tmp_path / "run", tmp_path / "digit.bmp")
    assert result.status == 2 and "does not say how images are sized and normalised" in result.err


def missing(*_: object) -> None:
    raise FileNotFoundError("the images are elsewhere")


def without_data(folder: Path) -> None:
    """Makes the weights of a run those of a version that kept nothing of the data."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(folder / WEIGHTS, "pt") as file:
        about = json.loads(file.metadata()[METADATA])
    del about["data"]
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {METADATA: json.dumps(about)})


def error_of(out: str) -> float:
    return float(out.splitlines()[1].split("error ")[1].split()[0])


def test_eval_tells_classes_by_their_names(run: Any, files: Path, tmp_path: Path) -> None:
    """The labels of the folder are other numbers than the network's: it has no ants."""
    path = files / "packed.safetensors"
    paths = sorted(path for name in ("bee", "cat") for path in (files / "png" / name).iterdir())
    labels = torch.tensor([CLASSES.index(each.parent.name) for each in paths])
    predictions = bqnn.load(path)(images_of(paths)).argmax(1)
    expected = 100 * float((predictions != labels).double().mean())
    result = run("eval", path, "--data", files / "png")
    assert result.status == 0, result.err
    assert result.out.splitlines()[0] == f"{path}: all of {files / 'png'}, 6 images"
    assert error_of(result.out) == pytest.approx(expected, abs=0.01)
    for part in ("train", "test"):
        shutil.copytree(files / "png", tmp_path / "set" / part)
    result = run("eval", path, "--dataset", f"folder:{tmp_path / 'set'}")
    assert result.status == 0, result.err
    assert error_of(result.out) == pytest.approx(expected, abs=0.01), "and the file's own normalization"


def test_a_network_in_colour_takes_grey_images(run: Any, files: Path, tmp_path: Path) -> None:
    known = Metadata(None, CLASSES, mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3))
    bqnn.save(make_packed(0, in_channels=3), tmp_path / "net", known)
    image = files / "images/cat/0.png"
    (row,) = json.loads(run("predict", tmp_path / "net", image, "--json").out)
    grey = images_of([image]).expand(-1, 3, -1, -1)
    expected = bqnn.predict(bqnn.load(tmp_path / "net"), grey).probs[0]
    assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def make_mistakes(files: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    shutil.copytree(files / "png", tmp_path / "renamed")
    (tmp_path / "renamed" / "cat").rename(tmp_path / "renamed" / "dog")
    bqnn.save(make_packed(0), tmp_path / "unknown")
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    bqnn.save(bqnn.pack(bqnn.convert(own)), tmp_path / "own", KNOWN)
    maps = bqnn.compile(bqnn.pack(bqnn.convert(nn.Sequential(nn.Conv2d(1, 2, 3)))), torch.zeros(2, 1, 8, 8))
    bqnn.save(maps, tmp_path / "maps", Metadata(mean=(0.4,), std=(0.3,)))


MISTAKES = [
    (["predict", "{files}/packed.safetensors", "{tmp}/bad.png"], "{tmp}/bad.png: can't be read as an image"),
    (["predict", "{files}/packed.safetensors", "{tmp}/no.png"], "{tmp}/no.png: no such image or folder of images"),
    (["predict", "{files}/packed.safetensors", "{tmp}/empty"], "{tmp}/empty: no images in it"),
    (["predict", "{tmp}/unknown", "{files}/png"], "{tmp}/unknown does not say how images are sized and normalised"),
    (["predict", "{tmp}/own", "{files}/png"], "{tmp}/own has a network of somebody's own"),
    (["predict", "{tmp}/maps", "{files}/png"], "{tmp}/maps is no classifier: it gives [2, 6, 6] for an image"),
    (["predict", "{tmp}/no", "{files}/png"], "{tmp}/no"),
    (["predict", "{tmp}/empty", "{files}/png"], "{tmp}/empty is not the folder of a run"),
    (["predict", "{files}/packed.safetensors", "{files}/png", "--samples", "0"], "--samples must be at least 1"),
    (["predict", "{files}/packed.safetensors", "{files}/png", "--top", "0"], "--top must be at least 1, got 0"),
    (["predict", "{files}/compiled.safetensors", "{files}/png", "--precision", "int8"], "--device and --precision"),
    (["eval", "{files}/packed.safetensors", "--data", "{tmp}/renamed"], "classes that the network does not know: dog;"),
    (["eval", "{files}/packed.safetensors", "--dataset", "digits"], "does not know: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; it"),
    (["eval", "{tmp}/unknown", "--data", "{files}/png"], "{tmp}/unknown does not say how images are sized"),
    (["eval", "{files}/packed.safetensors", "--data", "{files}/png", "--split", "validation"], "--data is tested as a"),
    (["eval", "{files}/packed.safetensors"], "--dataset or --data must say what to test"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_is_one_line(run: Any, files: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    make_mistakes(files, tmp_path)
    places = {"tmp": tmp_path, "files": files}
    result = run(*(argument.format(**places) for argument in arguments))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("bqnn: error: ") and result.err.count("\n") == 1
    assert message.format(**places) in result.err


def test_a_file_without_names_takes_as_many_classes_as_it_has(run: Any, files: Path, tmp_path: Path) -> None:
    bqnn.save(make_packed(0), tmp_path / "net", Metadata(mean=(0.4,), std=(0.3,)))
    result = run("eval", tmp_path / "net", "--data", files / "png")
    assert result.status == 2
    assert "has 2 classes (bee, cat), the network 3, without names" in result.err
    (row,) = json.loads(run("predict", tmp_path / "net", files / "images/cat/0.png", "--json").out)
    assert tuple(row["probabilities"]) == ("0", "1", "2")
