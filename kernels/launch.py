"""What launchers share: flags, grids and the reductions that end a kernel's partial sums."""

import inspect
import math
from functools import cache, cached_property, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from bqnn.kernels.seed_in_memory import SEED, reading_seed
from bqnn.kernels.weight_tiles import MOST_ELEMENTS, MOST_TILES, PROGRAMS

INTERPRETED = triton.knobs.runtime.interpret
# What follows from shapes, dtypes and the GPU is found once for each: the host would take longer than kernels.
planned = lru_cache(maxsize=4096)
# A block has so many elements where every element is treated by itself.
MATRIX_BLOCK = 1024
# A kernel is given all registers where ptxas would spill a few of them to fit another block on a multiprocessor.
ALL_REGISTERS = {"maxnreg": 255}
# A contraction is cut into no more parts than these, since each of them writes a float32 tensor of the output's size.
MAX_SPLITS = 8


# What launch() has compiled of each kernel, by the kernel's identity: kernels are made once and stay.
_tables = {}
# Triton compiles a kernel for pointers that are multiples of so many bytes, or for any.
ALIGNMENT = 16
# A table of compiled kernels that is as long as this is begun anew, since shapes may have no end.
MOST_LAUNCHES = 4096


class _Table:
    """Compiled kernels of one JITFunction, by what Triton compiles them for."""

    def __init__(self, kernel):
        heuristics = isinstance(kernel, triton.runtime.Heuristics)
        self.function = kernel.fn if heuristics else kernel
        self.heuristics = kernel.values if heuristics else {}
        parameters = inspect.signature(self.function.fn).parameters
        self.names = list(parameters)
        # Of numbers whose type is declared Triton looks at no value: a seed is another one in every call.
        self.typed = [i for i, each in enumerate(parameters.values()) if each.annotation is tl.int64]
        self.seed = self.names.index(SEED) if SEED in self.names else None
        self.compiled = {}

    @cached_property
    def reading_seed(self):
        return reading_seed(self.function)

    def rest(self, arguments, constants):
        """What the kernel takes after its positional arguments, in its order."""
        given = {**dict(zip(self.names, arguments)), **constants}
        given |= {name: value(given) for name, value in self.heuristics.items()}
        return tuple(given[name] for name in self.names[len(arguments) :])


def _append_kinds(key, arguments):
    """Appends what Triton compiles a kernel for: dtypes and alignments of tensors, also within a NamedTuple of them,
    and numbers, whose values say more than is needed, but for a float's."""
    for argument in arguments:
        if argument is None or type(argument) is int:
            key.append(argument)
        elif isinstance(argument, Tensor):
            key.append((argument.dtype,) if argument.data_ptr() % ALIGNMENT else argument.dtype)
        elif isinstance(argument, tuple) and isinstance(argument[0], Tensor):
            _append_kinds(key, argument)
        else:
            key.append(float if isinstance(argument, float) else argument)


def launch(kernel, grid, *arguments, **constants):
    """``kernel[grid](*arguments, **constants)``, which takes twice as long to look up and bind what is found here.

    A seed may be a tensor, which the kernel then reads. The compiled kernel is run just as Triton's JITFunction.run
    does, which is asked where there is none yet. Constants, flags and options that a kernel is compiled for, are given
    by keyword, and numbers may be.
    """
    table = _tables.get(id(kernel))
    if table is None:
        table = _tables[id(kernel)] = _Table(kernel)
    if table.seed is not None and isinstance(arguments[table.seed], Tensor):
        launch(table.reading_seed, grid, *arguments, **constants)
        return
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    device = driver.active.get_current_device()
    key = [device, *constants, *constants.values()]
    if table.typed:
        compared = list(arguments)
        for i in table.typed:
            compared[i] = None
        _append_kinds(key, compared)
    else:
        _append_kinds(key, arguments)
    key = tuple(key)
    found = table.compiled.get(key)
    if found is None or table.function.pre_run_hooks:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is not None:  # a hook of Triton's may have said that nothing is compiled
            if len(table.compiled) >= MOST_LAUNCHES:
                table.compiled.clear()
            table.compiled[key] = compiled, table.rest(arguments, constants)
        return
    compiled, rest = found
    stream = driver.active.get_current_stream(device)
    columns, rows, layers = (*grid, 1, 1)[:3]
    hooks = triton.knobs.runtime
    compiled.run(
        columns, rows, layers, stream, compiled.function, compiled.packed_metadata,
        compiled.launch_metadata(grid, stream, *arguments, *rest), hooks.launch_enter_hook, hooks.launch_exit_hook,
        *arguments, *rest,
    )  # fmt: skip


def cdiv(a, b):
    """a / b, rounded up; triton.cdiv takes microseconds, since kernels may call it too."""
    return -(-a // b)


def power_of_2(n):
    """The least power of two from n on, n being 1 or more."""
    return 1 << (n - 1).bit_length()


@planned
def blocks_of_matrix(rows, columns):
    """Grid and tile sizes of a kernel that goes over a matrix once; rows are on the axis that has no small limit."""
    BK = min(MATRIX_BLOCK, max(4, power_of_2(columns)))
    BN = MATRIX_BLOCK // BK
    return (cdiv(rows, BN), cdiv(columns, BK)), {"BN": BN, "BK": BK}


def level_sums(sums, codebook):
    """Sums [blocks, N, M], one of each row of each block, to the shape and dtype of the codebook they belong to."""
    by_row = codebook.shape[0] > 1
    return (sums.sum(0) if by_row else sums.view(-1, sums.shape[-1]).sum(0, keepdim=True)).to(codebook.dtype)


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
    return 0 if INTERPRETED else _architecture_of(driver.active.get_current_device())


@cache
def _architecture_of(number):
    """That of the GPU of this number, the present one: to ask its driver takes as long as a launch."""
    return driver.active.get_current_target().arch


def fewer_stages():
    """For products that ptxas spills a few registers of on sm_100 if Triton prefetches as far as it does by default."""
    return {"num_stages": 2} if architecture() >= 100 else {}


def registers_of_product(dtype):
    """All registers, but for operands of 2 bytes on sm_90: they leave ptxas enough to choose for itself."""
    return {} if architecture() == 90 and dtype.itemsize == 2 else ALL_REGISTERS


def tile_limits(in_blocks, dtype):
    """Stages and registers of a convolution's tile: where taps share one, and in float32, ptxas may spill a few."""
    stages = {} if in_blocks and dtype.itemsize == 2 else fewer_stages()
    return {**stages, **registers_of_product(dtype)}


def splits_of(blocks, length, step, device, most=MAX_SPLITS):
    """Into how many parts a contraction of ``length`` is cut so that the tiles keep a GPU busy, and a part's length."""
    return _splits_of(math.prod(blocks), length, step, processors(device), most)


@planned
def _splits_of(blocks, length, step, processors, most):
    steps = cdiv(length, step)
    parts = max(1, min(steps, processors // blocks, most))
    span = cdiv(steps, parts)
    return cdiv(steps, span), span * step


def grid_of(columns, BN, rows, BM, length, step, device):
    """Grid of a product [rows, length] @ [length, columns] in tiles of BM rows and BN columns, its third dimension the
    parts that the contraction is cut into, and a part's length; see :func:`splits_of`."""
    blocks = cdiv(columns, BN), cdiv(rows, BM)
    splits, span = splits_of(blocks, length, step, device)
    return (*blocks, splits), span


def sum_of_splits(parts, bias, dtype):
    """The sum of parts [S, ...], and of the bias if there is more than one part: a single one has it already."""
    if parts.shape[0] == 1:
        return parts[0]
    total = torch.sum(parts, 0, out=torch.empty_like(parts[0]))  # the sum has the strides of a part
    return (total if bias is None else total.add_(bias)).to(dtype)


def rows_of(x):
    """x [..., K] as a matrix whose rows are contiguous, a view if it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def cut(weight, levels):
    """For a kernel that goes over a weight once, as weight_tiles.py says: rows and columns of the matrix, tiles of a
    program, numbers of programs along both, and sizes of a tile."""
    return _cut(weight.numel(), *levels.shape)


@planned
def _cut(weights, rows, num_levels):
    columns = weights // rows
    size = MOST_ELEMENTS // (1 if num_levels <= 4 else 2 if num_levels <= 8 else 4)
    BK = min(size, power_of_2(columns))
    blocks = {"BN": size // BK, "BK": BK}
    tiles = min(MOST_TILES, power_of_2(max(1, weights // (size * PROGRAMS))))
    return (rows, columns, tiles), (cdiv(rows, blocks["BN"]), cdiv(columns, tiles * BK)), blocks
