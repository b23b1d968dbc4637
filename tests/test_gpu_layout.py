"""The words that GPU kernels read: every code at its place, zeros elsewhere."""

from __future__ import annotations

import pytest
import torch

from bqnn.core.codes import pack_codes
from bqnn.core.int8 import round_levels
from bqnn.ops.backends.gpu_layout import (
    BLOCK_WORDS,
    code_bits,
    integer_codebooks,
    make_gpu_layout,
    make_words,
    row_words,
)
from tests.support.shapes import EVERY_M

COLUMNS = [pytest.param(k, id=f"K{k}") for k in (1, 31, 32, 63, 129, 341, 512)]


@pytest.mark.parametrize("taps", [1, 3], ids=["linear", "taps3"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_words_hold_the_codes_and_zeros(num_levels: int, columns: int, taps: int) -> None:
    columns *= taps
    generator = torch.Generator().manual_seed(num_levels * 1000 + columns)
    codes = torch.randint(num_levels, (7, columns), generator=generator, dtype=torch.uint8)
    codes[0] = num_levels - 1
    words = make_words(pack_codes(codes, num_levels), num_levels, columns, taps)
    bits = {2: 1, 3: 2, 4: 2}.get(num_levels, 4)
    per_block = BLOCK_WORDS * 32 // bits
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.shape == (7, row_words(num_levels, columns))
    assert 0 <= words.shape[1] * (32 // bits) - columns < per_block
    word, field = torch.arange(words.shape[1]).unsqueeze(1), torch.arange(32 // bits)
    places = word // BLOCK_WORDS * per_block + field * BLOCK_WORDS + word % BLOCK_WORDS
    found = torch.zeros(7, words.shape[1] * (32 // bits), dtype=torch.long)
    found[:, places] = (words.long().unsqueeze(-1) >> (field * bits)) & (2**bits - 1)
    # Column k is of tap k // channels and channel k % channels.
    k, channels = torch.arange(columns), columns // taps
    expected = torch.zeros_like(found)
    expected[:, :columns] = codes[:, k % channels * taps + k // channels].long()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("num_levels", "columns", "word"),
    [
        pytest.param(2, {0: 1, 16: 0, 32: 1, 48: 1}, 0b1101, id="M2"),
        pytest.param(3, {0: 1, 16: 2, 48: 2}, 0b10_00_10_01, id="M3"),
        pytest.param(16, {0: 10, 16: 11, 32: 12, 112: 7}, 0x70000CBA, id="M16"),
    ],
)
def test_known_words(num_levels: int, columns: dict[int, int], word: int) -> None:
    codes = torch.tensor([[columns.get(k, 0) for k in range(113)]], dtype=torch.uint8)
    words = make_words(pack_codes(codes, num_levels), num_levels, 113)
    assert words.tolist() == [[word] + 15 * [0]]


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_int8_has_its_codebooks_with_it(num_levels: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    codes = pack_codes(torch.randint(num_levels, (7, 99), generator=generator, dtype=torch.uint8), num_levels)
    levels = torch.randn(groups, num_levels, generator=generator).sort(1).values
    words = make_words(codes, num_levels, 99)
    for precision in ("fp32", "bf16"):
        assert torch.equal(make_gpu_layout(codes, levels, 99, precision), words)
    layout = make_gpu_layout(codes, levels, 99, "int8")
    assert torch.equal(layout[:7], words)
    integers, scale = integer_codebooks(layout, 7, groups)
    expected, expected_scale = round_levels(levels, 99)
    assert torch.equal(integers[:, :num_levels], expected)
    assert torch.equal(scale, expected_scale)


def test_sizes() -> None:
    assert [code_bits(m) for m in (2, 3, 4, 5, 16)] == [1, 2, 2, 4, 4]
    assert row_words(2, 513) == 32
    assert row_words(3, 256) == 16
    assert row_words(16, 129) == 32


def test_no_channels() -> None:
    assert make_words(torch.empty(0, 2, dtype=torch.uint8), 3, 7).shape == (0, 16)


def test_bad_codes() -> None:
    with pytest.raises(ValueError, match="packed must have 2 bytes a channel for 7 codes of 3 levels, got 3"):
        make_words(torch.zeros(2, 3, dtype=torch.uint8), 3, 7)
