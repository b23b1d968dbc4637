"""bench.compare: two checkouts, timed in turns, each by its own package and its own benches."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from bench import compare


def checkout(folder: Path, seconds: float, wrong: str = "") -> Path:
    """A folder that stands for one: a package, and benches whose variants take so long."""
    bench = """
        import time
        from types import SimpleNamespace

        RIVALS, NETWORKS, OURS = ["theirs"], ["net"], ["ours"]
        CASES = [SimpleNamespace(values=("N3", 1, variant)) for variant in ("ours", "theirs", "other")]

        def group_name(shape, batch):
            return f"{shape}, batch {batch}"

        class Group:
            def __init__(self, *parameters):
                print("libraries talk")

            def call(self, variant):
                return lambda: time.sleep(SECONDS) or variant

            def check(self, variant, output):
                assert output == variant and variant != WRONG, "not right"

        LinearGroup = Conv2dGroup = TrainingGroup = Group
    """
    text = f"SECONDS, WRONG = {seconds}, {wrong!r}\n" + textwrap.dedent(bench)
    for name in ("bqnn/__init__.py", *(f"bench/bench_{name}.py" for name in ("packed_linear", "packed_conv2d"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name.startswith("bqnn") else text)
    (folder / "bench" / "bench_training.py").write_text(text)
    return folder


def test_checkouts_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, new = checkout(tmp_path / "base", 0.005), checkout(tmp_path / "new", 0.1, wrong="other")
    compare.main([str(base), str(new), "--rounds", "3"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["N3, batch 1", "N3, batch 1", "training, net"]
    assert "N3, batch 1: other" in lines[1] and lines[1].endswith("not timed, NEW: AssertionError: not right")
    ratios = [float(lines[i].split()[-1]) for i in (0, 2)]
    assert min(ratios) > 2.0
    assert lines[3].startswith("geometric mean of 2 cases ")
    assert float(lines[3].split()[-1]) == pytest.approx((ratios[0] * ratios[1]) ** 0.5, abs=2e-3)
    assert lines[4].startswith(f"worst {max(ratios):.3f}, ")


def test_a_checkout_is_compared_by_its_own_package(tmp_path: Path) -> None:
    base, new = checkout(tmp_path / "base", 0.0), checkout(tmp_path / "new", 0.0)
    with pytest.raises(SystemExit, match="no case was timed"):
        compare.main([str(base), str(new), "-k", "no such case"])
    (new / "bqnn" / "__init__.py").unlink()
    (new / "bqnn").rmdir()
    with pytest.raises(SystemExit, match="imports bqnn from"):
        compare.main([str(base), str(new)])
