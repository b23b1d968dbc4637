"""``python -m bench.kernel_resources``: registers, shared memory and instructions of every Triton kernel, to a table.

Compiles for sm_80 and sm_90, without a GPU, and writes bench/results/kernel_resources.json, which
tests/test_kernels_compile.py compares with: a kernel may not get worse unnoticed.
"""

from __future__ import annotations

import json

import triton
from tqdm import tqdm

from tests.aot import SHARED_LIMIT, compiled
from tests.compile_cases import CASES
from tests.test_kernels_compile import TABLE


def main() -> None:
    kernels: dict[str, dict[str, list[dict[str, object]]]] = {}
    for capability in SHARED_LIMIT:
        rows = kernels[f"sm_{capability}"] = {}
        for case, call in tqdm(CASES.items(), desc=f"sm_{capability}"):
            rows[case] = [kernel._asdict() for kernel in compiled(call, capability)]
            for kernel in rows[case]:
                tqdm.write(f"{case:<44}" + "  ".join(f"{key} {value}" for key, value in kernel.items()))
    TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main()
