"""Files that a person, not an accident, has changed: refused, or read as exactly what they declare."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.mutations import MEGABYTES, judge, mutated, peak_megabytes, seeds

FILES = 800


def test_a_mutated_file_is_refused_or_read_as_it_says(tmp_path: Path) -> None:
    draw, files = random.Random(2026), seeds()
    for each in files:
        judge(each.blob, tmp_path / "net", each.model())
    before, fates = peak_megabytes(), []
    for _ in range(FILES):
        each = draw.choice(files)
        fates.append(judge(mutated(draw, each.blob), tmp_path / "net", each.model()))
    assert peak_megabytes() - before < MEGABYTES
    assert 0.05 * FILES < fates.count("read") < 0.5 * FILES, "most files have to be refused, and some be read"
    assert len(set(fates)) > 100, "in many ways"
