"""tests.support.hostile with another build of the extension than the installed one; `make sanitize` runs it.

    python -m tests.support.sanitized build/sanitize/_C.abi3.so --calls 500
    python -m tests.support.sanitized build/sanitize/_C.abi3.so --planted

The second makes an op read past the end of its memory, of which a sanitizer has to say "heap-buffer-overflow".
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


if __name__ == "__main__":
    load(sys.argv[1])
    if sys.argv[2:] == ["--planted"]:
        read_past_the_end()
        sys.exit("no sanitizer has seen the read past the end")
    from tests.support import hostile

    sys.exit(hostile.main(sys.argv[2:]))
