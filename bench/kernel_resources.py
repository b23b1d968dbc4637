"""``python -m bench.kernel_resources``: registers, shared memory and instructions of every Triton kernel, to a table.

Compiles for sm_80, sm_90 and sm_100, without a GPU, and writes bench/results/kernel_resources.json, which
tests/test_kernels_compile.py compares with: a kernel may not get worse unnoticed. A quarter of an hour on two cores.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import triton
from tqdm import tqdm

from tests.support.aot import TABLE, TARGETS, compiled, sources
from tests.support.compile_cases import CASES


def resources(job: tuple[int, str]) -> list[dict[str, Any]]:
    """A row for each kernel of a case, a capability and the case's name: the kernel, and the digest of its source."""
    capability, case = job
    kernels, digests = compiled(CASES[case], capability), sources(CASES[case], capability)
    return [{**kernel._asdict(), "source": digest} for kernel, digest in zip(kernels, digests, strict=True)]


def main() -> None:
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {f"sm_{capability}": {} for capability in TARGETS}
    jobs = list(product(TARGETS, CASES))
    with ProcessPoolExecutor() as pool:
        for (capability, case), rows in zip(jobs, tqdm(pool.map(resources, jobs), total=len(jobs))):
            kernels[f"sm_{capability}"][case] = rows
            for row in rows:
                tqdm.write(f"sm_{capability} {case:<50}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main()
