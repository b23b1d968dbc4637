"""A folder of images with a subfolder for each class, as torchvision reads it: train, pack, and name a file's class.

python examples/image_folder.py [FOLDER]      # without one, a few seconds: digits of scikit-learn, written as JPEGs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

import bqnn

SIZE = 16  # of the images that the network sees


def write_digits(folder: Path, number: int) -> None:
    digits = load_digits()
    for i in range(number):
        path = folder / f"digit-{digits.target[i]}" / f"{i}.jpeg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((2 * SIZE, 2 * SIZE)).save(path)


def make_net(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, classes))


def train(folder: Path, epochs: int) -> dict[str, float]:
    reading = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    images = ImageFolder(str(folder), reading)
    part, held_out = random_split(images, [0.8, 0.2], torch.Generator().manual_seed(0))
    loader, validation = DataLoader(part, 32, shuffle=True), DataLoader(held_out, 256)
    torch.manual_seed(0)
    net = make_net(len(images.classes))
    result = bqnn.fit(net, loader, validation=validation, epochs=epochs, seed=0, log=print)

    small = bqnn.pack(result.net)
    path, _ = images.samples[held_out.indices[0]]
    prediction = bqnn.predict(small, reading(images.loader(path)).unsqueeze(0))
    chance, index = prediction.probs[0].max(0)
    print(f"{Path(path).relative_to(folder)} is of the class {images.classes[index]}, by {100 * chance:.0f} %")
    return {"error": result.history[-1]["validation_error"]}


def main(folder: str | None = None, images: int = 1200, epochs: int = 8) -> dict[str, float]:
    if folder is not None:
        return train(Path(folder), epochs)
    with tempfile.TemporaryDirectory() as made:
        write_digits(Path(made), images)
        return train(Path(made), epochs)


if __name__ == "__main__":
    main(*sys.argv[1:])
