"""The files of bench/results and README's tables, which are made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import save, tables
from bench.interleaved import Race
from bench.machine import RESULTS


class Nothing:
    """A group whose variants do nothing."""

    name, budget = "nothing, batch 1", 0.0

    def call(self, variant: str) -> Callable[[], object]:
        return lambda: None

    def check(self, variant: str, output: Any) -> dict[str, Any]:
        return {"distance": 0.5}


def result_of(seconds: dict[str, float]) -> dict[str, Any]:
    rows = {variant: {"seconds": median} for variant, median in seconds.items()}
    return {"bench": "it", "date": "2026-01-01", "versions": {"torch": "2"}, "elsewhere": None, "rows": rows}


def test_a_group_is_described_by_medians_and_what_its_check_returned() -> None:
    race = Race(Nothing(), ["1"], timed=False)
    race.seconds["1"] = [4.0, 1.0, 3.0, 2.0, 5.0]
    race.elsewhere = 0.25
    group = save.describe(race, "it")
    assert group["rows"] == {"1": {"seconds": 3.0, "quartiles": [2.0, 4.0], "rounds": 5, "distance": 0.5}}
    assert group["bench"] == "it" and group["versions"]["torch"] == torch.__version__
    assert group["elsewhere"] == 0.25


def test_a_group_is_saved_as_a_whole(tmp_path: Path) -> None:
    cpu = {"cpu": "Intel(R) Xeon(R) Processor", "cpu_family_model_stepping": ["6", "207", "2"], "cpu_isa": "amx"}
    machine = {**cpu, "threads": 2}
    path = tmp_path / "xeon-6-207-amx-2-threads.json"
    first = {f"it, batch {batch}": result_of({"ours": 1.0, "theirs": 2.0}) for batch in (64, 8)}
    assert save.save(first, machine, tmp_path) == [f"saved as {path}"]
    assert json.loads(path.read_text()) == {"machine": machine, "groups": first}
    assert list(json.loads(path.read_text())["groups"]) == ["it, batch 8", "it, batch 64"]
    again = {"it, batch 8": result_of({"ours": 3.0, "theirs": 4.0, "new": 5.0})}
    lines = save.save({**again, "it, batch 64": result_of({"new": 1.0})}, machine, tmp_path)
    assert lines[1:] == ["it, batch 64 is not saved: it ran without ours, theirs"]
    assert json.loads(path.read_text())["groups"] == {**first, **again}


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    paths = list(RESULTS.glob("*-threads.json"))
    assert paths
    for path in paths:
        save.write(json.loads(path.read_text()), tmp_path / path.name)
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_readme_shows_the_results() -> None:
    readme = tables.README.read_text()
    machines = tables.machines_of(readme)
    assert machines
    shown = {found[2] for found in tables.TABLE.finditer(readme)}
    assert shown == {*tables.OF_A_MACHINE, *tables.OF_A_FILE} - {*tables.ON_THE_SITE_ALONE}
    assert tables.render(readme, machines) == readme


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    group = {**result_of({"fpnn fp32": 2e-3, "int8 auto": 1e-3, "fp32 compiled": 4e-3}), "bench": "lenet5"}
    machine = {"cpu": "Some CPU", "cpu_family_model_stepping": ["1", "2", "3"], "cpu_isa": "avx2", "threads": 4}
    save.write({"machine": machine, "groups": {"lenet5, batch 8": group}}, tmp_path / "some.json")
    text = "<!-- machines: other -->\nbefore\n<!-- table: network -->\nstale\n<!-- end -->\nafter\n"
    assert tables.machines_of(text) == ["other"]
    found = tables.render(text, ["some"], tmp_path).splitlines()
    assert found[:3] == ["<!-- machines: some -->", "before", "<!-- table: network -->"]
    assert "Some CPU (family 1, model 2), avx2, 4 threads, torch 2, 2026-01-01:" in found
    assert "stale" not in found and found[-2:] == ["<!-- end -->", "after"]
    assert [line for line in found if line.startswith("|")] == [
        "| LeNet-5 | batch 1 | batch 8 | batch 64 | batch 512 |",
        "|---|---|---|---|---|",
        "| FPNN fp32 |  | 2 (1.00) |  |  |",
        "| **packed int8** |  | 1 (2.00) |  |  |",
        "| **packed fp32, compiled** |  | 4 (0.50) |  |  |",
    ]
    group["rows"]["int8 auto"]["seconds"] = 1e-4
    group["elsewhere"] = 0.25
    save.write({"machine": machine, "groups": {"lenet5, batch 8": group}}, tmp_path / "some.json")
    again = tables.render(text, ["some"], tmp_path)
    assert "| **packed int8** |  | 0.1 (20) |  |  |" in again
    assert "2026-01-01, while something else took up to 25% of the cores:" in again


def test_the_table_of_networks_names_the_fastest_of_both_sides() -> None:
    small = {"torch fp32": 4e-3, "torch fp32 nhwc": 3e-3, "torch bf16": 2e-3, "openvino int8": 1e-3}
    ours = {"bqnn int8": 2e-3, "bqnn compiled int8": 5e-4, "bqnn compiled bf16": 8e-4}
    groups = {
        "network lenet5, batch 64": result_of({**small, **ours}),
        "network mlp, batch 1": result_of({"onnxruntime fp32": 1e-3, "bqnn fp32": 4e-3}),
        "network vgg7, batch 1": result_of(small),
    }
    assert list(tables.networks(groups)) == [
        "| network, batch | FPNN in torch, fp32 | the fastest rival | **bqnn** | times faster |",
        "|---|---|---|---|---|",
        "| LeNet-5, 64 | 3 | 1, openvino int8 | 0.5, compiled int8 | **2.00** |",
        "| MLP 784-4096-4096-10, 1 |  | 1, onnxruntime fp32 | 4, fp32 | **0.25** |",
    ]
