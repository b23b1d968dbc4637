"""bench.compare: two checkouts, timed in turns, each by its own package and its own benches."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from bench import compare


def checkout(folder: Path, seconds: float, wrong: str = "") -> Path:
    """A folder that stands for one: a package, and benches whose variants take so long, by a clock of their own."""
    package = """
        import time

        now = 0.0
        time.perf_counter = lambda: now
    """
    bench = """
        from types import SimpleNamespace
        import bqnn

        RIVALS, NETWORKS, OURS = ["theirs"], ["net"], ["ours"]
        CASES = [SimpleNamespace(values=("N3", 1, variant)) for variant in ("ours", "theirs", "other")]

        def group_name(shape, batch):
            return f"{shape}, batch {batch}"

        class Group:
            def __init__(self, *parameters):
                print("libraries talk")

            def call(self, variant):
                def run():
                    bqnn.now += SECONDS
                    return variant

                return run

            def check(self, variant, output):
                assert output == variant and variant != WRONG, "not right"

        LinearGroup = Conv2dGroup = TrainingGroup = Group
    """
    package, bench = textwrap.dedent(package), f"SECONDS, WRONG = {seconds}, {wrong!r}\n" + textwrap.dedent(bench)
    for name in ("bqnn/__init__.py", *(f"bench/bench_{name}.py" for name in ("packed_linear", "packed_conv2d"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(package if name.startswith("bqnn") else bench)
    (folder / "bench" / "bench_training.py").write_text(bench)
    return folder


def test_checkouts_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, new = checkout(tmp_path / "base", 0.005), checkout(tmp_path / "new", 0.1, wrong="other")
    compare.main([str(base), str(new), "--rounds", "3"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["N3, batch 1", "N3, batch 1", "training, net"]
    assert "N3, batch 1: other" in lines[1] and lines[1].endswith("not timed, NEW: AssertionError: not right")
    assert [lines[i].split()[-1] for i in (0, 2)] == ["20.000", "20.000"]
    assert lines[3:] == ["geometric mean of 2 cases 20.000", "worst 20.000, N3, batch 1: ours"]


def test_a_checkout_is_compared_by_its_own_package(tmp_path: Path) -> None:
    base, new = checkout(tmp_path / "base", 0.0), checkout(tmp_path / "new", 0.0)
    with pytest.raises(SystemExit, match="no case was timed"):
        compare.main([str(base), str(new), "-k", "no such case"])
    (new / "bqnn" / "__init__.py").unlink()
    (new / "bqnn").rmdir()
    with pytest.raises(SystemExit, match="imports bqnn from"):
        compare.main([str(base), str(new)])
