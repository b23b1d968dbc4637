"""Philox4x32-10 against its published vectors and a second implementation, and the normals made of its words."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from bqnn.core import philox
from bqnn.core.philox import fresh_seed, normal, normals_from_words, philox4x32, random_words
from tests.support import formulas
from tests.support.helpers import SEED, triton_devices

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF
# Random123's kat_vectors give counter, key and words.
KNOWN_ANSWERS = [
    pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]
OFFSETS = [0, 1, 2**31 - 3, 2**32 - 2, 2**40 + 7, 2**62]


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The ten rounds in Python's unbounded integers."""
    for i in range(10):
        k0, k1 = ((key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32)
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = (high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0)
    return counter


def python_words(seed: int, call: int) -> tuple[int, ...]:
    return python_philox((call % 2**32, call // 2**32, 0, 0), (seed % 2**32, seed // 2**32))


def numbers(seed: int, offset: int, *shape: int) -> torch.Tensor:
    return normal(torch.tensor(seed), offset, shape, CPU, torch.float32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    found = philox4x32([torch.tensor([value]) for value in counter], key)
    assert tuple(int(word) for word in found) == words
    assert python_philox(counter, key) == words


@pytest.mark.parametrize("offset", OFFSETS)
def test_words_equal_a_second_implementation(offset: int) -> None:
    generator = random.Random(offset)
    for seed in [0, 1, 2**32 - 1, 2**32, 2**63 - 1, *(generator.getrandbits(63) for _ in range(20))]:
        words = random_words(seed, offset, 5, 6, CPU)
        assert words.t().tolist() == [list(python_words(seed, offset + 5 + call)) for call in range(6)]
        calls = np.arange(6, dtype=np.uint64) + np.uint64(offset + 5)
        assert formulas.philox_words(seed, calls).tolist() == words.t().tolist()


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 63, 4231])
def test_element_i_is_number_i_mod_4_of_call_offset_plus_i_div_4(total: int) -> None:
    seed, offset = 0xDEADBEEF_12345678 >> 1, 2**32 - 3
    found = numbers(seed, offset, total)
    for i in {0, total // 3, total // 2, total - 1}:
        words = [word >> 8 for word in python_words(seed, offset + i // 4)]
        radius_word, angle_word = (words[0], words[1]) if i % 4 < 2 else (words[2], words[3])
        radius = math.sqrt(-2.0 * math.log((radius_word + 1) / 2**24))
        angle = 2.0 * math.pi * angle_word / 2**24
        expected = radius * (math.cos(angle) if i % 2 == 0 else math.sin(angle))
        assert found[i].item() == pytest.approx(expected, rel=2e-6, abs=2e-6)
    torch.testing.assert_close(found.double(), formulas.noise(seed, offset, (total,)), rtol=2e-6, atol=2e-6)


def test_extreme_words_give_finite_numbers() -> None:
    words = torch.tensor([0, 255, ONES, ONES - 255]).repeat(4, 1)
    assert torch.isfinite(normals_from_words(words)).all()
    largest = normals_from_words(torch.zeros(4, 1, dtype=torch.int64))
    assert largest[0].tolist() == pytest.approx([math.sqrt(48.0 * math.log(2.0)), 0.0] * 2)


@pytest.mark.parametrize("calls", [1, 7, 64, 1 << 20])
def test_numbers_do_not_depend_on_the_block(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(5, 9, 341)
    monkeypatch.setattr(philox, "CALLS_A_BLOCK", calls)
    assert torch.equal(numbers(5, 9, 341), expected)


def test_numbers_do_not_depend_on_the_shape() -> None:
    flat = numbers(5, 9, 3 * 5 * 7)
    assert torch.equal(numbers(5, 9, 3, 5, 7).flatten(), flat)
    assert torch.equal(numbers(5, 9, 105, 1).flatten(), flat)
    assert torch.equal(numbers(5, 9, 21), flat[:21])
    assert torch.equal(numbers(5, 11, 97), flat[8:])
    assert numbers(5, 9, 0, 3).shape == (0, 3)
    assert normal(torch.tensor(5), 9, (), CPU, torch.float32) == flat[0]


def test_dtypes_are_casts_of_the_float32_numbers() -> None:
    expected = numbers(5, 9, 129)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(normal(torch.tensor(5), 9, (129,), CPU, dtype), expected.to(dtype))


def test_every_bit_of_the_seed_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(63))]
    samples = torch.stack([numbers(seed, 0, 8) for seed in seeds])
    assert samples.unique(dim=0).shape[0] == len(seeds)


def test_moments_and_correlations() -> None:
    count = 200_000
    sample = numbers(2023, 0, count).double()
    for power, expected, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert sample.pow(power).mean().item() == pytest.approx(expected, abs=4.0 * math.sqrt(variance / count))
    calls = sample.view(-1, 4)
    correlation = calls.t() @ calls / calls.shape[0]
    assert (correlation - correlation.diag().diag()).abs().max() < 4.0 / math.sqrt(calls.shape[0])
    assert abs((sample[4:] * sample[:-4]).mean()) < 4.0 / math.sqrt(count)


def test_kolmogorov_smirnov() -> None:
    count = 200_000
    probability = torch.special.ndtr(numbers(2023, 2**33, count).double().sort().values)
    rank = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum(probability - rank / count, (rank + 1) / count - probability).max()
    assert distance * math.sqrt(count) < 1.63  # 1.63 is the 1 % point of Kolmogorov's distribution


def test_manual_seed_governs_fresh_seeds() -> None:
    torch.manual_seed(7)
    first = [int(fresh_seed()) for _ in range(3)]
    torch.manual_seed(7)
    assert [int(fresh_seed()) for _ in range(3)] == first
    torch.manual_seed(8)
    assert int(fresh_seed()) != first[0]
    assert len(set(first)) == 3
    seed = fresh_seed()
    assert seed.shape == () and seed.dtype == torch.int64
    assert max(first) >= 2**32, "the high half of the key is never used"


def test_fresh_seeds_stay_on_the_cpu_under_a_default_device() -> None:
    torch.manual_seed(7)
    expected = int(fresh_seed())
    torch.manual_seed(7)
    with torch.device("meta"):
        seed = fresh_seed()
    assert seed.device.type == "cpu"
    assert int(seed) == expected


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**32, 2**63 - 1])
def test_a_seed_in_a_tensor_gives_the_same_words(seed: int) -> None:
    expected = random_words(seed, 7, 3, 50, CPU)
    assert torch.equal(random_words(torch.tensor(seed), 7, 3, 50, CPU), expected)


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_kernels_draw_the_same_words(seed: int, offset: int, device: str) -> None:
    from tests.support.philox_kernels import words_kernel

    words = torch.empty((4, 37), dtype=torch.int64, device=device)
    words_kernel[(3,)](words, seed, offset, 37, BLOCK=16)
    assert torch.equal(words, random_words(seed, offset, 0, 37, torch.device(device)))


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("offset", OFFSETS)
def test_kernels_make_the_same_normals(offset: int, device: str) -> None:
    from tests.support.philox_kernels import normals_kernel, normals_of_rows_kernel

    expected = normal(torch.tensor(SEED), offset, (8, 60), CPU, torch.float64)
    for launch in (
        lambda out: normals_kernel[(4,)](out, SEED, offset, 480, BLOCK=128),
        lambda out: normals_of_rows_kernel[(2, 4)](out, SEED, offset, 60, BR=4, BC=16, ALIGNED=True),
        lambda out: normals_of_rows_kernel[(4, 2)](out, SEED, offset, 60, BR=2, BC=32, ALIGNED=False),
    ):
        out = torch.empty(8, 60, device=device)
        launch(out)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-6, atol=1e-6)
