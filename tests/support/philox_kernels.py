"""Kernels that write the random numbers of bqnn.kernels.philox to memory, as they are."""

import triton
import triton.language as tl

from bqnn.kernels.philox import normals_at, normals_of_rows, random_words


@triton.jit(do_not_specialize=["seed", "offset"])
def words_kernel(p_words, seed: tl.int64, offset: tl.int64, calls, BLOCK: tl.constexpr):
    o_call = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = random_words(seed, offset + o_call.to(tl.int64))
    for i in tl.static_range(4):
        tl.store(p_words + i * calls + o_call, words[i].to(tl.int64), mask=o_call < calls)


@triton.jit(do_not_specialize=["seed", "offset"])
def normals_kernel(p_normals, seed: tl.int64, offset: tl.int64, count, BLOCK: tl.constexpr):
    o_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_normals + o_index, normals_at(seed, offset, o_index.to(tl.int64)), mask=o_index < count)


@triton.jit(do_not_specialize=["seed", "offset"])
def normals_of_rows_kernel(
    p_normals, seed: tl.int64, offset: tl.int64, columns, BR: tl.constexpr, BC: tl.constexpr, ALIGNED: tl.constexpr
):
    o_row, first = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BC
    o_column = first + tl.arange(0, BC)
    normals = normals_of_rows(seed, offset, o_row, first, columns, BC, ALIGNED)
    tl.store(p_normals + o_row[:, None] * columns + o_column[None, :], normals, mask=(o_column < columns)[None, :])
