"""The folder of a run: who may write it, and its text, read as if anybody could have written it."""

from __future__ import annotations

import contextlib
import json
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from bqnn.core.files import open_regular
from bqnn.core.text import shown
from bqnn.lab.recipe import Recipe

METADATA = "run"
"""The key of the metadata of model.safetensors under which recipe, factory and what is known of the data stand."""
DATA = "data"
SPLITS = ("test", "validation")
IMAGES = ("train", "validation", "test")
"""The splits whose numbers of images metrics.json has; runs that are older have none."""
MOST_IMAGES = 2**53  # so many have a number in float64, and so has every integer up to it
CHECKPOINT, WEIGHTS, METRICS = "checkpoint.pt", "model.safetensors", "metrics.json"
UNCERTAINTY = {split: f"uncertainty-{split}.json" for split in SPLITS}
PACKED = "packed.safetensors"
"""The packed network of a run, where nobody says another name."""
MEMBERS = "members.json"
"""What the folder of an ensemble has, whose members are runs in folders of their own."""
LOCK = ".lock"
# Fields of a recipe that earlier versions wrote no value of, and what their runs had: a default that changes later
# leaves these as they are.
ADDED: dict[str, Any] = {
    "spike_width": 0.25,
    "slab_share": 0.1,
    "start_sigma": 0.1,
    "label_smoothing": 0.0,
    "autocast": "none",
    "layer_levels": "",
    "kl_weight": 1.0,
}
NUMBERS = (int, float)
# What a record of an epoch has, and which of it may be None.
RECORD: dict[str, tuple[type, ...]] = {
    "epoch": (int,),
    "phase": (str,),
    "loss": NUMBERS,
    "nll": NUMBERS,
    "kl": NUMBERS,
    "validation_error": (*NUMBERS, types.NoneType),
    "validation_nll": (*NUMBERS, types.NoneType),
    "quantization_loss": (*NUMBERS, types.NoneType),
    "near_share": (*NUMBERS, types.NoneType),
    "seconds": NUMBERS,
}


class RunLock:
    """A context in which no other process, and no other lock of this one, writes the run in ``folder``.

    It may be entered again inside. It makes the folder where there is none. A process that dies lets go of it: the
    system does, whatever file is left.

    Raises:
        OSError: on entering, where somebody else is inside.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / LOCK, timeout=0, thread_local=False)

    def __enter__(self) -> RunLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise OSError(f"{self.folder} is in use: another process is writing this run") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock.lock_counter == 1:
            # While it is held: who opened the file before finds, once the lock is theirs, that it has no name left.
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        self._lock.release()


class Metrics(NamedTuple):
    """What a metrics.json holds."""

    recipe: Recipe
    history: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]  # by split, what `bqnn eval` found
    images: dict[str, int]  # by split; empty of a run that is older than this field


def read_metrics(path: Path, splits: Sequence[str]) -> Metrics:
    """What a metrics.json holds, the scores on those of ``splits`` that have any.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can not be read.
        ValueError: it is not what training writes; one line that names the file.
    """
    with open_regular(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it must be an object, got {type(content).__name__}")
        recipe, history = read_recipe(content.get("recipe")), check_history(content.get("history"))
        scores = {name: content[name] for name in splits if name in content}
        for name, each in scores.items():
            _check_scores(name, each)
        images = _check_images(content.get("images", {}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what bqnn train writes: {shown(str(error))}") from error
    return Metrics(recipe, history, scores, images)


def read_scores(path: Path, splits: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The scores on ``splits`` in the metrics.json at ``path``, none where there is no such file.

    Raises:
        OSError: it can not be read.
        ValueError: it is not what training writes, or of another recipe than ``recipe``.
    """
    if not path.exists():
        return {}
    stored = read_metrics(path, splits)
    check_same(path, asdict(stored.recipe), recipe)
    return stored.scores


def read_recipe(content: Any) -> Recipe:
    """The recipe with the fields ``content``, as JSON has them.

    One that is missing has what runs had before it was added, or its default.

    Raises:
        ValueError: a field is unknown, or of a wrong type or value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"recipe must be an object, got {type(content).__name__}")
    return Recipe.of_fields(with_added_fields(content))


def with_added_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored recipe, and those of :data:`ADDED` that it was written too early to have."""
    return {**ADDED, **stored}


def check_same(path: Path, stored: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError, with what differs, unless ``stored``, from ``path``, are the fields of ``recipe``."""
    mine, stored = asdict(recipe), with_added_fields(stored)
    if names := [name for name in mine if mine[name] != stored.get(name)]:
        changes = ", ".join(f"{name} was {stored.get(name)!r:.80}, now {mine[name]!r}" for name in names)
        raise ValueError(f"{path} is of another recipe: {changes}")


def _check_scores(name: str, scores: Any) -> None:
    """Raises ValueError unless ``scores`` are numbers, the error among them, and objects of numbers."""
    if not isinstance(scores, dict) or "error" not in scores:
        raise ValueError(f"{name!r:.80} must be scores, the error among them, got {scores!r:.80}")
    for score, value in scores.items():
        numbers = value.values() if isinstance(value, dict) and score != "error" else [value]
        if any(type(number) not in NUMBERS or not _has_float(number) for number in numbers):
            raise ValueError(f"{score!r:.80} of {name!r:.80} can not be {value!r:.80}")


def _has_float(value: Any) -> bool:
    """Whether ``value`` is no integer, or one that a float can stand for."""
    return type(value) is not int or abs(value) <= MOST_IMAGES


def _check_images(images: Any) -> dict[str, int]:
    """``images``, numbers of images by split, or none; raises ValueError unless they are."""
    if not isinstance(images, dict) or set(images) not in (set(), set(IMAGES)):
        raise ValueError(f"images must have {', '.join(IMAGES)}, got {images!r:.80}")
    for name, count in images.items():
        if type(count) is not int or not 0 <= count <= MOST_IMAGES:
            raise ValueError(f"images of {name} must be a count, got {count!r:.80}")
    return images


def check_history(history: Any) -> list[dict[str, Any]]:
    """``history``, a list of records as training makes them, one an epoch.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(history, list):
        raise ValueError(f"history must be a list, got {type(history).__name__}")
    for record in history:
        if not isinstance(record, dict) or set(record) != set(RECORD):
            raise ValueError(f"history must hold records of {', '.join(RECORD)}, got {record!r:.80}")
        for name, value in record.items():
            if type(value) not in RECORD[name] or not _has_float(value):
                raise ValueError(f"{name} of a record of the history can not be {value!r:.80}")
    return history


def print_now(line: str) -> None:
    """Prints a line at once, so that a redirected run can be watched."""
    print(line, flush=True)
