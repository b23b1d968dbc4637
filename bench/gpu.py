"""Everything that needs a GPU, in one command: ``make gpu``, or ``python -m bench.gpu`` where bqnn is installed.

Runs the tests that use a GPU, compute-sanitizer (memcheck, racecheck) on small cases where it is installed, and the
benches; writes bench/results/<gpu>.json and prints a table. Needs torch, triton and pytest, and no network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import gpu_packed, gpu_training
from bench.gpu_timing import ROUNDS, copy_bandwidth
from bench.gpu_training import Asked, Row
from bench.machine import RESULTS, describe_machine
from bench.summary import Verdict
from tests.support.shapes import Conv2dShape, LinearShape

OPS = ("sample_linear", "sample_conv2d", "moment_linear", "moment_conv2d")
OPS += ("spike_slab_kl", "mixture_kl", "assign_codes")
PACKED = ("packed_linear", "packed_conv2d")
TESTS = [
    *(f"tests/test_{op}.py" for op in (*OPS, *PACKED)),
    *(f"tests/test_{name}.py" for name in ("philox", "moment", "int8", "cuda_packed_linear")),
]
"""The test files that run something on a GPU where there is one; tests/test_bench.py looks that none is missing."""
SANITIZED = "cuda and (triton or cuda-cuda) and M3 and (B1 or B2)"
KL_BYTES = 24
"""Bytes of memory traffic a weight: two parameters are read in forward and in backward, two gradients are written."""
KL_BANDWIDTH = 0.7
"""The share of a copy's bandwidth that is asked of the divergence."""
KL_KEPT = 8.5
"""Bytes a weight that a step may hold at most: two gradients, and the sums of blocks of weights."""


class Plan(NamedTuple):
    """What the benches run: layers and networks of training, weights of a divergence, sizes and batches of packed
    linear layers with what is asked of them, a packed convolution, and rounds of a measurement."""

    layers: Mapping[str, LinearShape | Conv2dShape] = gpu_training.LAYERS
    networks: Mapping[str, tuple[int, ...]] = gpu_training.NETWORKS
    kl_weights: int = 1 << 24
    packed_linear: Mapping[tuple[int, int], float] = gpu_packed.FASTER
    packed_conv2d: tuple[int, int, int, int, int] = gpu_packed.CONV
    rounds: int = ROUNDS


PLAN = Plan()


def run_tests() -> dict[str, str]:
    """The closing line of pytest, and of each of compute-sanitizer's tools."""
    found = {"pytest": _last_line([sys.executable, "-m", "pytest", "-q", *TESTS, "-k", "cuda"])}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS, "-k", SANITIZED]
        found[tool] = _last_line([str(sanitizer), "--tool", tool, "--target-processes", "all", *pytest])
    return found


def _last_line(command: list[str]) -> str:
    print(" ".join(command), flush=True)
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(output.stdout[-4000:], flush=True)
    return f"exit {output.returncode}: {output.stdout.strip().splitlines()[-1]}"


def benches(device: torch.device, ours: str, plan: Plan = PLAN) -> Iterator[Callable[[], Iterable[Row]]]:
    """Each makes the rows of one case."""
    rounds = plan.rounds
    for kind in gpu_training.KINDS:
        for name, shape in plan.layers.items():
            yield partial(gpu_training.layer_rows, kind, name, shape, device, ours, rounds)
    yield partial(gpu_training.kl_rows, plan.kl_weights, device, ours, rounds)
    for model, images in plan.networks.items():
        yield partial(gpu_training.network_rows, model, images, device, ours, rounds)
    for size, batch in plan.packed_linear:
        yield partial(gpu_packed.linear_rows, size, batch, device, rounds=rounds)
    yield partial(gpu_packed.conv2d_rows, device, plan.packed_conv2d, rounds)


def asked_of(case: str) -> list[Asked]:
    return next((wanted for name, wanted in gpu_training.ASKED.items() if case.startswith(name)), [])


def verdicts(rows: list[Row], ours: str, bandwidth: float, plan: Plan = PLAN) -> Iterator[Verdict | str]:
    """Of each figure that is asked; a line instead where a result is too far off to have one."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.variant] = row
    for case, variants in by_case.items():
        own = variants.get(ours)
        for want in asked_of(case):
            rival = variants.get(want.rival)
            if rival is None or own is None:
                continue
            if own.error is not None and own.error > gpu_training.ALLOWED:
                yield f"{case}: no figure, the result is {own.error:.2g} away from the reference's"
                break
            yield Verdict(f"{case}: time of {rival.variant} over ours", want.faster, rival.seconds / own.seconds)
            if want.smaller is not None:
                ratio = rival.peak_bytes / max(1, own.peak_bytes)
                yield Verdict(f"{case}: peak memory of {rival.variant} over ours", want.smaller, ratio)
        if case.startswith("spike_slab_kl") and own is not None:
            share = KL_BYTES * plan.kl_weights / own.seconds / bandwidth
            yield Verdict(f"{case}: share of the copy's bandwidth", KL_BANDWIDTH, share)
            kept = KL_KEPT * plan.kl_weights / max(1, own.peak_bytes)
            yield Verdict(f"{case}: bytes of the gradients over peak memory", 1.0, kept)
    yield from gpu_packed.verdicts(rows, bandwidth, plan.packed_linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true", help="benches alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: there is no GPU here")
    device, ours = torch.device("cuda"), "triton"
    result: dict[str, object] = {"machine": describe_machine()}
    if not arguments.no_tests:
        result["tests"] = run_tests()
    bandwidth = copy_bandwidth(device)
    _, result["rivals not here"] = gpu_packed.rivals()
    print("\n".join(f"{name}: not timed, {reason}" for name, reason in gpu_packed.rivals()[1].items()), flush=True)
    rows: list[Row] = []
    failures: list[str] = []
    for bench in benches(device, ours):
        try:
            for row in bench():
                rows.append(row)
                print(
                    f"{row.case:<44}{row.variant:<22}{1e6 * row.seconds:>12.1f} us{row.peak_bytes / 2**20:>10.1f} MiB",
                    flush=True,
                )
        except Exception as error:  # the other cases are still worth their time
            failures.append(f"{type(error).__name__}: {error}")
            print(failures[-1], flush=True)
        torch.cuda.empty_cache()
    lines = [str(verdict) for verdict in verdicts(rows, ours, bandwidth)]
    result |= {"copy_bytes_per_second": bandwidth, "rows": [row._asdict() for row in rows], "failures": failures}
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps({**result, "verdicts": lines}, indent=1) + "\n")
    print("\n".join(lines))
    print(result.get("tests", ""))


if __name__ == "__main__":
    main()
