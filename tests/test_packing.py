"""Base-M digits in bytes: exact round trips, known bytes, bad input."""

from __future__ import annotations

import pytest
import torch

from bqnn.core.codes import digits_per_byte, find_bad_byte, pack_codes, packed_width, unpack_codes

EVERY_M = [pytest.param(m, id=f"M{m}") for m in range(2, 17)]
COLUMNS = [pytest.param(k, id=f"K{k}") for k in (1, 2, 5, 7, 8, 9, 63, 129, 341)]
DIGITS = {2: 8, 3: 5, 4: 4, 5: 3, 6: 3} | dict.fromkeys(range(7, 17), 2)


@pytest.mark.parametrize("num_levels", EVERY_M)
def test_digits_per_byte(num_levels: int) -> None:
    digits = digits_per_byte(num_levels)
    assert digits == DIGITS[num_levels]
    assert num_levels**digits <= 256 < num_levels ** (digits + 1)


@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize("columns", COLUMNS)
def test_round_trip(num_levels: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_levels * 1000 + columns)
    codes = torch.randint(num_levels, (13, columns), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, num_levels - 1
    packed = pack_codes(codes, num_levels)
    assert packed.shape == (13, packed_width(columns, num_levels))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, num_levels, columns), codes)
    assert find_bad_byte(packed, num_levels, columns) is None


@pytest.mark.parametrize("num_levels", EVERY_M)
def test_bytes_are_base_m_digits(num_levels: int) -> None:
    columns = 11
    codes = torch.randint(num_levels, (3, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    digits = digits_per_byte(num_levels)
    expected = [
        [
            sum(int(code) * num_levels**i for i, code in enumerate(row[start : start + digits]))
            for start in range(0, columns, digits)
        ]
        for row in codes.tolist()
    ]
    assert pack_codes(codes, num_levels).tolist() == expected


@pytest.mark.parametrize(
    ("num_levels", "codes", "packed"),
    [
        pytest.param(2, [[1, 0, 0, 0, 0, 0, 0, 1, 1]], [[129, 1]], id="M2"),
        pytest.param(3, [[1, 2, 0, 1, 2, 2]], [[1 + 6 + 27 + 162, 2]], id="M3"),
        pytest.param(4, [[3, 2, 1, 0], [0, 0, 0, 3]], [[27], [192]], id="M4"),
        pytest.param(6, [[5, 5, 5, 4]], [[215, 4]], id="M6"),
        pytest.param(16, [[1, 15, 7]], [[241, 7]], id="M16"),
    ],
)
def test_known_bytes(num_levels: int, codes: list[list[int]], packed: list[list[int]]) -> None:
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), num_levels).tolist() == packed


def test_non_contiguous_codes() -> None:
    codes = torch.randint(3, (7, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes.t(), 3), pack_codes(codes.t().contiguous(), 3))


def test_no_channels() -> None:
    assert pack_codes(torch.empty(0, 7, dtype=torch.uint8), 3).shape == (0, 2)
    assert unpack_codes(torch.empty(0, 2, dtype=torch.uint8), 3, 7).shape == (0, 7)


@pytest.mark.parametrize("num_levels", [-1, 0, 1, 17])
def test_num_levels_out_of_range(num_levels: int) -> None:
    with pytest.raises(ValueError, match=f"num_levels must be from 2 to 16, got {num_levels}"):
        digits_per_byte(num_levels)


def test_bad_codes() -> None:
    with pytest.raises(TypeError, match="codes must be torch.uint8, got torch.int64"):
        pack_codes(torch.zeros(2, 3, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"codes must have the shape .*, got \[2, 3, 1\]"):
        pack_codes(torch.zeros(2, 3, 1, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="codes must be below num_levels, 3, got 3"):
        pack_codes(torch.full((2, 3), 3, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="packed must have 3 bytes a channel for 11 codes of 3 levels, got 2"):
        unpack_codes(torch.zeros(2, 2, dtype=torch.uint8), 3, 11)


@pytest.mark.parametrize(
    ("num_levels", "columns", "row", "byte"),
    [
        pytest.param(3, 10, [242, 243], 1, id="M3-too-large"),
        pytest.param(3, 7, [242, 9], 1, id="M3-padding"),
        pytest.param(2, 9, [255, 2], 1, id="M2-padding"),
        pytest.param(16, 3, [255, 16], 1, id="M16-padding"),
        pytest.param(5, 6, [125, 0], 0, id="M5-too-large"),
    ],
)
def test_bad_byte_is_found(num_levels: int, columns: int, row: list[int], byte: int) -> None:
    packed = torch.tensor([[0, 0], row], dtype=torch.uint8)
    problem = find_bad_byte(packed, num_levels, columns) or ""
    assert f"byte {byte} of channel 1 must be below" in problem
    assert problem.endswith(f"got {row[byte]}")
    assert find_bad_byte(packed[:1], num_levels, columns) is None
