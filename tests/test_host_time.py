"""bench.host_time: what it counts and keeps; the times themselves are the bench's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from bench import host_time
from tests.support.shapes import INTERPRETED

# Kernels of a forward and backward pass, which are the launches that a host makes for them.
LAUNCHES = {"sample_linear": 3, "spike_slab_kl": 2, "codebook_from_raw": 0}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
def test_a_row_has_times_and_launches() -> None:
    rows = {row["op"]: row for row in host_time.rows(list(LAUNCHES), repeats=1)}
    assert {name: row["launches"] for name, row in rows.items()} == LAUNCHES
    assert all(row["forward"] > 0.0 and row["step"] > 0.0 for row in rows.values())
    linear = rows["sample_linear"]
    assert linear["ratio"] == pytest.approx(linear["step"] / linear["ordinary step"], abs=0.01)


def test_tables_stand_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "host_time.json"
    for name, step in (("before", 2.0), ("after", 1.0), ("before", 3.0)):
        host_time.save(name, [{"op": "it", "step": step}], path)
    found = {name: table["rows"][0]["step"] for name, table in json.loads(path.read_text()).items()}
    assert found == {"before": 3.0, "after": 1.0}


def test_the_table_has_every_op() -> None:
    tables = json.loads(host_time.TABLE.read_text())
    assert {name: {row["op"] for row in table["rows"]} for name, table in tables.items()} == {
        "before": set(host_time.OPS),
        "after": set(host_time.OPS),
    }
