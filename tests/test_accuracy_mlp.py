"""bench.accuracy_mlp: the perceptron by fit and by hand, in small."""

from __future__ import annotations

import pytest
import torch

from bench import accuracy_mlp
from bqnn.data.sources import Split


@pytest.mark.parametrize("way", list(accuracy_mlp.WAYS))
def test_a_perceptron_is_trained_in_three_phases(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_mlp, "BATCH", 32)
    images = torch.randint(256, (96, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:48, :, 14:] //= 8  # the two classes differ in what is bright
    data = accuracy_mlp.as_vectors(Split(images, torch.arange(96) // 48))
    found = accuracy_mlp.run(way, 0, data, data)
    assert found["test_error"] == 0.0 and found["near_share"] > 0.1 and found["seed"] == 0


def test_batches_are_of_the_whole_data_set() -> None:
    loader = accuracy_mlp.loader_of(torch.arange(300.0).view(300, 1), torch.arange(300))
    batches = list(loader)
    assert [len(y) for _, y in batches] == [128, 128, 44] and len(loader) == 3 and len(loader.dataset) == 300
    assert all(torch.equal(x[:, 0], y.float()) for x, y in batches)
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(300))


def test_the_gap_is_between_the_means() -> None:
    runs = {"fit": [1.0, 2.0], "by hand": [2.0, 1.5]}
    table = {way: [{"test_error": error} for error in errors] for way, errors in runs.items()}
    assert accuracy_mlp.gap(table) == pytest.approx(0.25)
