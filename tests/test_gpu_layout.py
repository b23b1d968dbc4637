"""The words that GPU kernels read: every code at its place, zeros elsewhere."""

from __future__ import annotations

import pytest
import torch

from bqnn.ops._gpu_layout import code_bits, make_gpu_layout, row_words
from bqnn.packing import pack_codes
from tests.shapes import EVERY_M

COLUMNS = [pytest.param(k, id=f"K{k}") for k in (1, 31, 32, 63, 129, 341, 512)]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_words_hold_the_codes_and_zeros(num_levels: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_levels * 1000 + columns)
    codes = torch.randint(num_levels, (7, columns), generator=generator, dtype=torch.uint8)
    codes[0] = num_levels - 1
    layout = make_gpu_layout(pack_codes(codes, num_levels), num_levels, columns)
    bits = {2: 1, 3: 2, 4: 2}.get(num_levels, 4)
    assert layout.dtype == torch.int32
    assert layout.is_contiguous()
    assert layout.shape[1] % 4 == 0
    assert 0 <= layout.shape[1] * (32 // bits) - columns < 128 // bits
    fields = (layout.long().unsqueeze(-1) >> torch.arange(0, 32, bits)) & (2**bits - 1)
    expected = torch.zeros(7, layout.shape[1] * (32 // bits), dtype=torch.long)
    expected[:, :columns] = codes
    assert torch.equal(fields.flatten(1), expected)


@pytest.mark.parametrize(
    ("num_levels", "codes", "word"),
    [
        pytest.param(2, [1, 0, 1, 1] + 28 * [0], 0b1101, id="M2"),
        pytest.param(3, [1, 2, 0, 2], 0b10_00_10_01, id="M3"),
        pytest.param(16, [10, 11, 12, 0, 0, 0, 0, 7], 0x70000CBA, id="M16"),
    ],
)
def test_known_words(num_levels: int, codes: list[int], word: int) -> None:
    layout = make_gpu_layout(pack_codes(torch.tensor([codes], dtype=torch.uint8), num_levels), num_levels, len(codes))
    assert layout.tolist() == [[word, 0, 0, 0]]


def test_sizes() -> None:
    assert [code_bits(m) for m in (2, 3, 4, 5, 16)] == [1, 2, 2, 4, 4]
    assert row_words(2, 129) == 8
    assert row_words(3, 64) == 4
    assert row_words(16, 33) == 8


def test_no_channels() -> None:
    assert make_gpu_layout(torch.empty(0, 2, dtype=torch.uint8), 3, 7).shape == (0, 4)


def test_bad_codes() -> None:
    with pytest.raises(ValueError, match="packed must have 2 bytes a channel for 7 codes of 3 levels, got 3"):
        make_gpu_layout(torch.zeros(2, 3, dtype=torch.uint8), 3, 7)
