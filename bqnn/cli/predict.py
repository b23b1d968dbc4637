"""What `bqnn predict` does: classes and probabilities of images, by a run or a file."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bqnn.bayes.predict import predict as ask
from bqnn.cli.opened import Opened, open_network
from bqnn.core.ensemble import Stacked
from bqnn.core.text import shown
from bqnn.data.image_folder import image_files, read_images
from bqnn.lab.labels import check_prepared, prepared

BATCH = 64  # images that are decoded, and asked about, at a time
LONGEST = 60  # characters of a name
SPREAD = ("entropy", "mutual_information")


def predict(options: Namespace, device: str) -> None:
    """`bqnn predict`, on ``device``."""
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    files = [file for path in options.images for file in image_files(path)]
    opened = open_network(options, device)
    check_prepared(opened.metadata, options.path)
    several = options.samples > 1 or isinstance(opened.net, Stacked)
    rows = _rows(opened, files, options, device)
    if options.json:
        print(json.dumps([row if several else _without_spread(row) for row in rows], indent=1))
        return
    for row in rows:
        print(_line(row, options.top, several))


def _without_spread(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in SPREAD}


def _rows(opened: Opened, files: Sequence[Path], options: Namespace, device: str) -> Iterator[dict[str, Any]]:
    """For each image its file, the most probable class, and the probabilities by class, with entropies in nats."""
    metadata = opened.metadata
    samples = None if options.samples == 1 else options.samples
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        images = read_images(batch, metadata.in_channels or 0, metadata.image_size or 0)
        with torch.no_grad(), opened.computing(device):
            found = ask(opened.net, prepared(images, metadata).to(device), samples, seed=options.seed)
        if found.probs.dim() != 2:
            raise ValueError(f"{options.path} is no classifier: it gives {list(found.probs.shape[1:])} for an image")
        names = metadata.classes or tuple(map(str, range(found.probs.shape[1])))
        for file, *values in zip(batch, *(each.tolist() for each in found), strict=True):
            probs, *spread = values
            by_class = dict(zip(names, probs, strict=True))
            best = max(by_class, key=by_class.__getitem__)
            yield {
                "image": str(file),
                "class": best,
                "probabilities": by_class,
                **dict(zip(SPREAD, spread, strict=True)),
            }


def _line(row: dict[str, Any], top: int, several: bool) -> str:
    by_class = row["probabilities"]
    best = sorted(by_class, key=by_class.__getitem__, reverse=True)[:top]
    classes = ", ".join(f"{shown(name, LONGEST)} {100 * by_class[name]:.2f} %" for name in best)
    spread = f"  entropy {row['entropy']:.4f} nats  mutual information {row['mutual_information']:.4f} nats"
    return f"{shown(row['image'])}: {classes}{spread if several else ''}"
