"""Whether the kernels are right on a GPU: every op once against the reference, the tests, and compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_rows import Row
from bench.gpu_timing import Meter
from bench.machine import ROOT
from bqnn import ops
from bqnn.bayes.options import SLAB_SHARE, SPIKE_WIDTH
from bqnn.ops import dispatch
from tests.support.helpers import Case, make_case
from tests.support.packed_products import conv2d_case, linear_case
from tests.support.shapes import Conv2dShape, LinearShape

ALLOWED = 1e-2
"""The relative distance from the reference that a float32 result may have: tf32 would be within it, an error not."""
LINEAR, CONV2D = LinearShape(33, 65, 132), Conv2dShape(3, 20, 18, 9, 10, (3, 2), stride=(2, 1), padding=(1, 1))
NUM_LEVELS, SEED = 3, 20261

OPS = ("sample_linear", "sample_conv2d", "moment_linear", "moment_conv2d")
OPS += ("spike_slab_kl", "mixture_kl", "assign_codes")
PACKED = ("packed_linear", "packed_conv2d")
TESTS = (
    *("tests/test_cuda_packed_linear.py", "tests/test_torch_program.py"),
    *("tests/test_packed_linear.py", "tests/test_packed_conv2d.py"),
    *("tests/test_seed_in_memory.py", "tests/test_mixture_kl.py", "tests/test_int8.py"),
    *("tests/test_moment_conv2d.py", "tests/test_sample_conv2d.py"),
    *("tests/test_moment_linear.py", "tests/test_sample_linear.py", "tests/test_moment.py"),
    *("tests/test_spike_slab_kl.py", "tests/test_assign_codes.py", "tests/test_philox.py"),
)
"""The test files that run something on a GPU where there is one, those first that are the most likely to fail: what
never ran on one, then what has the most ways. tests/test_bench.py looks that none is missing."""
SANITIZED = "cuda and (triton or cuda-cuda) and M3 and (B1 or B2)"
TOOLS = ("memcheck", "racecheck")
SAID = 2000
"""Characters of an answer that are kept."""
STOPPING_SECONDS = 20.0
"""What a command has to stop in, when asked to."""


def smoke_rows(op: str, meter: Meter) -> Iterator[Row]:
    """Results and gradients of one small call on every backend that is there, and their distance from the reference."""
    backends = [name for name in dispatch.ORDER if dispatch.status(op, name, meter.device.type).usable]
    call = (_packed_call if op in PACKED else _training_call)(op, meter.device)
    expected = call("reference")
    for backend in backends:
        if backend == "reference":
            continue
        error = meter.distance(call(backend), expected)
        failed = error is not None and not error <= ALLOWED
        yield Row(f"smoke-{op}", backend, error=error, failed=failed)
    if len(backends) == 1:
        yield Row(f"smoke-{op}", "reference", said="no other backend is here", failed=True)


def _training_call(op: str, device: torch.device) -> Callable[[str], list[Tensor]]:
    case = make_case(CONV2D if op.endswith("conv2d") else LINEAR, NUM_LEVELS, "channel", (SEED, 0)).to(device).leaves()
    function: Any = getattr(ops, op)
    posterior = case.weight, case.log_sigma2, case.levels
    if op == "assign_codes":
        return lambda backend: [function(case.weight, case.thresholds, True, backend).float()]
    if op == "spike_slab_kl":
        tau = torch.full_like(case.levels, 0.1)
        return _with_gradients(lambda backend: function(*posterior, tau, backend), posterior)
    if op == "mixture_kl":
        prior = torch.full((), 0.25, device=device), SPIKE_WIDTH, SLAB_SHARE
        return _with_gradients(lambda backend: function(*posterior, *prior, backend), posterior)
    return _with_gradients(lambda backend: _product(function, case, backend), (case.x, *posterior, case.bias))


def _product(function: Any, case: Case, backend: str) -> Tensor:
    return function(*case.tensors(), torch.tensor(SEED), **case.geometry, backend=backend)


def _with_gradients(run: Callable[[str], Tensor], leaves: Sequence[Tensor]) -> Callable[[str], list[Tensor]]:
    def call(backend: str) -> list[Tensor]:
        y = run(backend)
        upstream = torch.ones_like(y)
        return [y.detach(), *torch.autograd.grad(y, list(leaves), upstream)]

    return call


def _packed_call(op: str, device: torch.device) -> Callable[[str], list[Tensor]]:
    function: Any = getattr(ops, op)
    if op == "packed_linear":
        x, codes, levels, bias, _ = linear_case(NUM_LEVELS, "channel", 5, 33, 300)
        geometry = {}
    else:
        x, codes, levels, bias, _ = conv2d_case(NUM_LEVELS, "channel", (2, 18, 20), 3)
        geometry = {"kernel_size": 3, "padding": 1}
    tensors = [each.to(device) for each in (x, codes, levels, bias)]
    precisions = ("fp32", "int8")
    return lambda backend: [
        function(*tensors, **geometry, precision=precision, backend=backend) for precision in precisions
    ]


def pytest_rows(path: str, select: str, processes: int, seconds: float) -> Iterator[Row]:
    """pytest on one file, in so many processes where pytest-xdist is there: its closing line, and what failed."""
    spread = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    status, output = finished([sys.executable, "-m", "pytest", "-q", *spread, path, "-k", select], seconds)
    failures = "\n".join(re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE))
    yield Row("tests", path, said=f"{_closing_line(output)}\n{failures}".strip()[:SAID], failed=status != 0)


def sanitizer_rows(tool: str, path: str, seconds: float) -> Iterator[Row]:
    """compute-sanitizer's ``tool`` on the small cases of one file. A test that fails is no concern of it."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield Row(tool, path, said="compute-sanitizer is not here")
        return
    pytest = [sys.executable, "-m", "pytest", "-q", path, "-k", SANITIZED]
    status, output = finished([sanitizer, "--tool", tool, "--target-processes", "all", *pytest], seconds)
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    found = sum(int(error or hazard) for error, hazard in summaries)
    said = f"{found} found; {_closing_line(output)}" if summaries else f"no summary, exit {status}: {output[-SAID:]}"
    yield Row(tool, path, said=said[:SAID], failed=found > 0 or not summaries)


def _closing_line(output: str) -> str:
    closing = re.compile(r"\d+ (passed|failed|skipped|deselected|errors?)\b.* in \d")
    lines = [line for line in output.splitlines() if closing.search(line)]
    return lines[-1].strip("= ") if lines else output[-SAID:]


def finished(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a command, in the root of the repository. One that takes longer is asked to stop, as by
    Ctrl-C, and then has to."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for patience, signal_name in ((seconds, "SIGINT"), (STOPPING_SECONDS, "SIGKILL"), (None, "")):
        try:
            output, _ = process.communicate(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, getattr(signal, signal_name))
    return process.returncode, output
