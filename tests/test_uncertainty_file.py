"""The files of what was measured: written whole, read back, and refused where anything is not as it is written."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bqnn.lab.folder import UNCERTAINTY, RunLock
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, clear_run
from bqnn.lab.uncertainty_file import add_uncertainty, read_uncertainty, write_uncertainty
from tests.support.measured import measured


def run_in(folder: Path) -> Run:
    return Run(folder, Recipe(), [], {})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_uncertainty(tmp_path) is None
    assert read_uncertainty(tmp_path / "no folder") is None
    result = measured()
    path = add_uncertainty(run_in(tmp_path), result)
    assert path == tmp_path / "uncertainty-test.json"
    assert read_uncertainty(tmp_path) == result
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "neither a lock nor a temporary file stays"


def test_the_test_split_comes_before_the_validation_split(tmp_path: Path) -> None:
    for split in ("validation", "test"):
        add_uncertainty(run_in(tmp_path), {**measured(), "split": split})
        assert read_uncertainty(tmp_path) == {**measured(), "split": split}


def test_a_run_that_begins_anew_has_none(tmp_path: Path) -> None:
    for split in UNCERTAINTY:
        add_uncertainty(run_in(tmp_path), {**measured(), "split": split})
    clear_run(tmp_path)
    assert read_uncertainty(tmp_path) is None


def test_a_run_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(OSError, match="is in use"):
        add_uncertainty(run_in(tmp_path), measured())
    assert read_uncertainty(tmp_path) is None


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    result = measured()
    result["clean"]["nll"] = math.nan
    with pytest.raises(ValueError):
        write_uncertainty(tmp_path / "x.json", result)
    assert list(tmp_path.iterdir()) == []


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(result: Any) -> None:
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = to

    return apply


CHANGES = [
    pytest.param(change("temperature", to="1"), "'1'", id="text-for-a-number"),
    pytest.param(change("samples", to=True), "True", id="bool"),
    pytest.param(change("network", to=3), "network must be a string", id="number-for-a-text"),
    pytest.param(change("clean", "nll", to=math.inf), "'clean' can not have inf", id="infinite"),
    pytest.param(change("clean", "nll", to=math.nan), "'clean' can not have nan", id="nan"),
    pytest.param(change("mean", "nll", to=10**300), "'mean' can not have", id="huge"),
    pytest.param(change("mean", to=[]), "'mean' must be an object", id="list-for-scores"),
    pytest.param(change("clean", "more", to=1.0), "'clean' must have error, nll", id="unknown-score"),
    pytest.param(change("more", to=1.0), "must have network", id="unknown-part"),
    pytest.param(lambda result: result.pop("coverage"), "must have network", id="missing-part"),
    pytest.param(lambda result: result["corruptions"]["fog"].pop(), "'fog' must have scores at 5", id="four-strengths"),
    pytest.param(change("corruptions", "fog", 4, to=None), "'fog' must be an object", id="no-scores"),
    pytest.param(change("ood", "inverted", to={}), "'inverted' must have entropy", id="no-entropy"),
    pytest.param(change("ood", "inverted", "entropy", to={"auroc": 1}), "must have auroc, fpr95", id="no-fpr95"),
    pytest.param(change("reliability", "images", to=[1.0]), "'reliability' must have lists", id="shorter"),
    pytest.param(change("coverage", "error", to=["x", 1.0]), "'coverage' can not have 'x'", id="text-in-a-list"),
    pytest.param(change("coverage", to={"coverage": [], "error": []}), "'coverage' must have lists", id="empty"),
    pytest.param(change("entropy", "edges", to=[0.0, 1.0]), "edges one number more", id="edges"),
    pytest.param(change("entropy", "shares", to={}), "shares must have clean", id="no-shares"),
    pytest.param(change("entropy", "shares", "clean", to=[1.0]), "'shares' must have lists", id="shares"),
    pytest.param(change("corruptions", to={}), "corruptions must not be empty", id="no-corruption"),
]


@pytest.mark.parametrize("apply, message", CHANGES)
def test_what_was_changed_is_named(tmp_path: Path, apply: Callable[[dict[str, Any]], Any], message: str) -> None:
    result = copy.deepcopy(measured())
    apply(result)
    path = tmp_path / UNCERTAINTY["test"]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError) as caught:
        read_uncertainty(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{path} is not what bqnn eval --uncertainty writes: ")
    assert message in text and "\n" not in text


DAMAGE = {"empty": "", "list": "[]", "number": "3", "open": "{", "deep": "[" * 100_000, "control": '{"\x1b": 1}'}


@pytest.mark.parametrize("text", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / UNCERTAINTY["validation"]).write_text(text)
    with pytest.raises(ValueError, match="is not what bqnn eval --uncertainty writes"):
        read_uncertainty(tmp_path)
