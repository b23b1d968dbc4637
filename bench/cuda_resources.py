"""``python -m bench.cuda_resources``: registers, shared memory and instructions of every CUDA kernel, to a table.

Compiles for sm_80 and sm_90, without a GPU, and writes bench/results/cuda_resources.json, which
tests/test_cuda_build.py compares with: a kernel may not get worse unnoticed. A digest of the sources tells that test
what it need not compile again.
"""

from __future__ import annotations

import json

from tests.support.nvcc import ARCHITECTURES, TABLE, TOOLKIT, compiled, sources


def main() -> None:
    if TOOLKIT is None:
        raise SystemExit("there is no CUDA toolkit; CUDA_HOME would name its folder")
    lines = []
    for architecture in ARCHITECTURES:
        for kernel in compiled(TOOLKIT, architecture):
            print(f"sm_{architecture}  " + "  ".join(f"{key} {value}" for key, value in kernel._asdict().items()))
            lines.append(json.dumps({"architecture": architecture, **kernel._asdict()}))
    rows = ",\n  ".join(lines)
    made_of = f' "nvcc": {json.dumps(TOOLKIT.release)},\n "sources": {json.dumps(sources())}'
    TABLE.write_text(f'{{\n{made_of},\n "kernels": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
