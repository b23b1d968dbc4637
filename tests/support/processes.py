"""A program in two processes that talk to each other, on the loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BEGIN = """
import os, sys, torch, torch.distributed as dist
rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
"""

END = """
dist.barrier()
print("done", flush=True)
os._exit(0)  # threads of gloo may still be about, for which C++ would end the process with an error
"""


def run_in_two(program: str) -> None:
    """Runs ``program``, which has ``torch``, ``dist`` and ``rank``, in both; fails with the output of one that does."""
    port = str(_free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + program + END, str(rank), port],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0 and output.strip().endswith("done"), output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
