"""``python -m bench.packed_spills``: compiles all that the rule of packed products chooses, for every kind of weight.

Without a GPU, for sm_80 and sm_90, all precisions, or those that are named: ``python -m bench.packed_spills 90 bf16``.
Prints each kernel that spills registers, and exits with 1 where there is one. Tests compile a choice of these
(tests/compile_cases.py): all of them take a quarter of an hour.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

from tests.aot import HELD, compiled
from tests.compile_cases import packed_conv2d_case, packed_linear_case

ROWS = {"fp32": (1, 16, 32, 64), "bf16": (1, 16, 32, 64, 128), "int8": (1, 16, 32, 64, 128)}
LEVELS = (2, 3, 4, 5, 16)


def calls(precision: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for num_levels, groups, rows in itertools.product(LEVELS, (1, 512), ROWS[precision]):
        name = f"{precision} M{num_levels} {'channel' if groups > 1 else 'tensor'} B{rows}"
        yield f"packed_linear {name}", packed_linear_case(rows, precision, num_levels, groups)
        if rows > 1:
            side = {16: 4, 32: 5, 64: 8, 128: 12}[rows]
            yield f"packed_conv2d {name}", packed_conv2d_case((1, 128, side, side), 512, precision, num_levels, groups)


def main() -> None:
    named = sys.argv[1:]
    capabilities = [capability for capability in HELD if str(capability) in named] or HELD
    precisions = [precision for precision in ROWS if precision in named] or list(ROWS)
    spilled = 0
    for capability, precision in itertools.product(capabilities, precisions):
        for name, call in calls(precision):
            for kernel in compiled(call, capability):
                if kernel.local or kernel.stack:
                    spilled += 1
                    print(f"sm_{capability} {name}: {kernel}", flush=True)
    print(f"{spilled} kernels spill registers")
    raise SystemExit(bool(spilled))


if __name__ == "__main__":
    main()
