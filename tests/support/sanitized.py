"""tests.support.hostile with another build of the extension than the installed one; `make sanitize` runs it.

    python -m tests.support.sanitized build/sanitize/_C.abi3.so --calls 500
    python -m tests.support.sanitized build/sanitize/_C.abi3.so --graphs 100
    python -m tests.support.sanitized build/sanitize/_C.abi3.so --files 300
    python -m tests.support.sanitized build/sanitize/_C.abi3.so --planted

The second runs so many drawn graphs by every plan. The third reads so many changed files of compiled networks, and runs
those that are taken. The fourth makes an op read past the end of its memory, of which a sanitizer has to say
"heap-buffer-overflow".
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader


def load(path: str) -> None:
    """Makes the library at ``path`` what ``bqnn._C`` is; to be called before anything imports bqnn."""
    if "bqnn" in sys.modules:
        raise RuntimeError("bqnn has been imported, with the extension that is installed")
    import torch  # noqa: F401  (whose libraries the extension needs)

    spec = importlib.util.spec_from_file_location("bqnn._C", path, loader=ExtensionFileLoader("bqnn._C", path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["bqnn._C"] = module


def read_past_the_end() -> None:
    """Hands an op a tensor of 32 numbers in memory that has 16."""
    import torch

    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    memory = (ctypes.c_char * 128).from_address(malloc(64))
    x = torch.frombuffer(memory, dtype=torch.float32)
    torch.ops.bqnn_cpu.square(x, torch.empty(32))


def run_graphs(count: int) -> None:
    """Programs of drawn graphs, of integers or not, by every plan, for some batches, on one thread and on two."""
    import torch

    from bqnn.engine.program import Program
    from bqnn.engine.reference import run
    from tests.support.draw_graphs import draw_graph
    from tests.support.programs import PLANS, check_near, of_batch

    for seed in range(count):
        graph, inputs = draw_graph(seed, quantized=seed % 2 == 1)
        batches = [of_batch(inputs, batch) for batch in (1, 2, 7)]
        expected = [run(graph, given) if seed % 2 == 0 else None for given in batches]
        for plan, options in PLANS.items():
            program = Program(graph, **options, cache=1 << seed % 20)
            for given, right in zip(batches, expected):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    found = program(given)
                    torch.set_num_threads(1)
                    assert all(bool(y.isfinite().all()) for y in found), (seed, plan)
                    if right is not None:
                        check_near(found, right)
    print(f"{count} graphs, {len(PLANS)} plans each")


if __name__ == "__main__":
    load(sys.argv[1])
    if sys.argv[2:] == ["--planted"]:
        read_past_the_end()
        sys.exit("no sanitizer has seen the read past the end")
    if sys.argv[2] == "--graphs":
        run_graphs(int(sys.argv[3]))
        sys.exit(0)
    if sys.argv[2] == "--files":
        from tests.support import graph_mutations

        graph_mutations.main(int(sys.argv[3]), seed=0)
        sys.exit(0)
    from tests.support import hostile

    sys.exit(hostile.main(sys.argv[2:]))
