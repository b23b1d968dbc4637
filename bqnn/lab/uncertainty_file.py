"""What bqnn.lab.uncertainty measured, in JSON files: read as if anybody could have written them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bqnn.core.files import open_regular, write_content
from bqnn.core.text import shown
from bqnn.data.corruptions import STRENGTHS
from bqnn.lab.folder import NUMBERS, SPLITS, UNCERTAINTY, RunLock
from bqnn.lab.runs import Run

LARGEST = 1e30  # of a number that a figure can be drawn of
SCORES = ("error", "nll", "brier", "ece", "scaled_nll", "scaled_ece", "aurc", "entropy", "mutual_information")
TEXTS, COUNTS = ("network", "dataset", "split"), ("images", "samples", "seed", "temperature")
PARTS = ("clean", "mean", "corruptions", "ood", "reliability", "coverage", "entropy")


def write_uncertainty(path: Path, result: Mapping[str, Any]) -> None:
    """Writes what was measured to ``path``, as a whole or not at all.

    Raises:
        OSError: the file can not be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(result, indent=1, allow_nan=False)
    write_content(path, text + "\n")


def add_uncertainty(run: Run, result: Mapping[str, Any]) -> Path:
    """Writes what was measured of a run into its folder, one file a split, and returns the path.

    Raises:
        OSError: the file can not be written, or another process is writing the run.
        ValueError: a number is not finite.
    """
    path = run.folder / UNCERTAINTY[result["split"]]
    with RunLock(run.folder):
        write_uncertainty(path, result)
    return path


def read_uncertainty(folder: Path) -> dict[str, Any] | None:
    """What was measured of the run in ``folder`` on its test split, or else on its validation split; or None.

    Raises:
        OSError: the file can not be read.
        ValueError: it is not what :func:`add_uncertainty` writes; one line that names the file.
    """
    path = next((folder / UNCERTAINTY[split] for split in SPLITS if (folder / UNCERTAINTY[split]).exists()), None)
    if path is None:
        return None
    with open_regular(path) as file:
        text = file.read()
    try:
        content: dict[str, Any] = json.loads(text)
        _check(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what bqnn eval --uncertainty writes: {shown(str(error))}") from error
    return content


def _check(content: Any) -> None:
    """Raises ValueError unless ``content`` has all that is described in bqnn.lab.uncertainty, and nothing else."""
    _check_names("it", content, (*TEXTS, *COUNTS, *PARTS))
    for name in TEXTS:
        if not isinstance(content[name], str):
            raise ValueError(f"{name} must be a string, got {content[name]!r:.80}")
    _check_numbers("numbers", (content[name] for name in COUNTS))
    for name in ("clean", "mean"):
        _check_scores(name, content[name])
    if not content["corruptions"]:
        raise ValueError("corruptions must not be empty")
    for name, strengths in _items("corruptions", content["corruptions"]):
        if not isinstance(strengths, list) or len(strengths) != len(STRENGTHS):
            raise ValueError(f"{name!r:.80} must have scores at {len(STRENGTHS)} strengths")
        for each in strengths:
            _check_scores(name, each)
    for name, uncertainties in _items("ood", content["ood"]):
        if not {"entropy"} <= set(dict(_items(name, uncertainties))) <= {"entropy", "mutual_information"}:
            raise ValueError(f"{name!r:.80} must have entropy and may have mutual_information")
        for each in uncertainties.values():
            _check_names(name, each, ("auroc", "fpr95"))
            _check_numbers(name, each.values())
    _check_columns("reliability", content["reliability"], ("confidence", "accuracy", "images"))
    _check_columns("coverage", content["coverage"], ("coverage", "error"))
    _check_names("entropy", content["entropy"], ("edges", "shares"))
    shares = dict(_items("shares", content["entropy"]["shares"]))
    _check_columns("shares", shares, tuple(shares))
    _check_columns("edges", {"edges": content["entropy"]["edges"]}, ("edges",))
    if "clean" not in shares or len(content["entropy"]["edges"]) != len(shares["clean"]) + 1:
        raise ValueError("shares must have clean, and edges one number more than each of them")


def _items(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{name!r:.80} must be an object, got {value!r:.80}")
    return value.items()


def _check_names(name: str, value: Any, names: tuple[str, ...]) -> None:
    if {key for key, _ in _items(name, value)} != set(names):
        raise ValueError(f"{name!r:.80} must have {', '.join(names)}")


def _check_scores(name: str, value: Any) -> None:
    _check_names(name, value, SCORES)
    _check_numbers(name, value.values())


def _check_columns(name: str, value: Any, names: tuple[str, ...]) -> None:
    """Lists of numbers, at least one in each, and as many in each."""
    _check_names(name, value, names)
    columns = list(value.values())
    if not all(isinstance(column, list) and column for column in columns) or len({len(each) for each in columns}) > 1:
        raise ValueError(f"{name!r:.80} must have lists of one length")
    for column in columns:
        _check_numbers(name, column)


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if type(value) not in NUMBERS or not abs(value) < LARGEST:
            raise ValueError(f"{name!r:.80} can not have {value!r:.80}")
