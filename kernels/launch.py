"""What launchers share: flags, grids and the reductions that end a kernel's partial sums."""

import math
from functools import cache

import torch
import triton
from triton.runtime import driver

# A block has so many elements where every element is treated by itself.
MATRIX_BLOCK = 1024
# A kernel is given all registers where ptxas would spill a few of them to fit another block on a multiprocessor.
ALL_REGISTERS = {"maxnreg": 255}
# A contraction is cut into no more parts than these, since each of them writes a float32 tensor of the output's size.
MAX_SPLITS = 8


def blocks_of_matrix(rows, columns):
    """Grid and tile sizes of a kernel that goes over a matrix once; rows are on the axis that has no small limit."""
    BK = min(MATRIX_BLOCK, max(4, triton.next_power_of_2(columns)))
    BN = MATRIX_BLOCK // BK
    return (triton.cdiv(rows, BN), triton.cdiv(columns, BK)), {"BN": BN, "BK": BK}


def level_sums(sums, codebook):
    """Sums [blocks, N, M], one of each row of each block, to the shape and dtype of the codebook they belong to."""
    sums = sums.sum(0)
    return (sums if codebook.shape[0] > 1 or sums.shape[0] == 1 else sums.sum(0, keepdim=True)).to(codebook.dtype)


def flags_of_codebook(levels):
    """The flags of a kernel that has a codebook, levels [1 or N, M]."""
    return {"NUM_LEVELS": levels.shape[1], "PER_CHANNEL": int(levels.shape[0] > 1)}


def flags_of_posterior(posterior):
    """Those of a kernel that takes a posterior, or None where its weight is made before."""
    return {"NUM_LEVELS": 0, "PER_CHANNEL": 0} if posterior is None else flags_of_codebook(posterior.levels)


def flags_of_sample(posterior):
    """Those of a kernel that samples the weight of a posterior, if it is not None. ALIGNED: rows are whole calls of
    Philox."""
    aligned = posterior is not None and posterior.weight.shape[1:].numel() % 4 == 0
    return {**flags_of_posterior(posterior), "ALIGNED": aligned}


def flags_of_product(x, posterior):
    """The flags of a fused product; float32 is multiplied as torch's own products are."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {**flags_of_codebook(posterior.levels), "PRECISION": "tf32" if tf32 else "ieee"}


@cache
def processors(device):
    """Streaming multiprocessors of a GPU; 1 in the interpreter, where nothing runs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def architecture():
    """The architecture of the GPU that kernels are compiled for, 90 for sm_90; 0 in the interpreter."""
    return 0 if triton.knobs.runtime.interpret else driver.active.get_current_target().arch


def fewer_stages():
    """For products that ptxas spills a few registers of on sm_100 if Triton prefetches as far as it does by default."""
    return {"num_stages": 2} if architecture() >= 100 else {}


def registers_of_product(dtype):
    """All registers, but for operands of 2 bytes on sm_90: they leave ptxas enough to choose for itself."""
    return {} if architecture() == 90 and dtype.itemsize == 2 else ALL_REGISTERS


def splits_of(blocks, length, step, device, most=MAX_SPLITS):
    """Into how many parts a contraction of ``length`` is cut so that the tiles keep a GPU busy, and a part's length."""
    steps = triton.cdiv(length, step)
    parts = max(1, min(steps, processors(device) // math.prod(blocks), most))
    span = triton.cdiv(steps, parts)
    return triton.cdiv(steps, span), span * step


def sum_of_splits(parts, bias, dtype):
    """The sum of parts [S, ...], and of the bias if there is more than one part: a single one has it already."""
    if parts.shape[0] == 1:
        return parts[0]
    total = torch.sum(parts, 0, out=torch.empty_like(parts[0]))  # the sum has the strides of a part
    return (total if bias is None else total.add_(bias)).to(dtype)


def leading(x):
    """The product of all dimensions but the last."""
    return math.prod(x.shape[:-1])


def rows_of(x):
    """x [..., K] as a matrix whose rows are contiguous, a view if it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
