"""The stages of ``make gpu``, in the order of their worth, and the tasks that each consists of.

There is no stage that tunes kernels: tiles are rules in the launchers, which read no file, so that nothing found here
could be taken up without a change of code. Where a figure is missed, its rows say by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import bqnn
from bench import gpu_checks, gpu_networks, gpu_packed, gpu_runs, gpu_training
from bench.gpu_networks import Network
from bench.gpu_rows import Row, Task, measured
from bench.gpu_timing import Meter
from bqnn.core import native
from tests.support.shapes import Conv2dShape, LinearShape

COPY = "copy"


class Plan(NamedTuple):
    """What the stages run."""

    layers: Mapping[str, LinearShape | Conv2dShape] = gpu_training.LAYERS
    divergence_weights: int = 1 << 24
    copied_bytes: int = 1 << 30
    packed_linear: Mapping[tuple[int, int], float] = gpu_packed.FASTER
    """What is asked of packed linear layers, by size and batch."""
    packed_conv2d: tuple[int, int, int, int, int] = gpu_packed.CONV
    networks: Mapping[str, Network] = gpu_networks.NETWORKS
    references: Sequence[str] = ("lenet5", "densenet40")
    """Networks whose step is also timed on the reference."""
    tests: Sequence[str] = gpu_checks.TESTS
    select: str = "cuda"
    """pytest's expression for the tests of a file."""
    processes: int = 8
    """Of the tests of a file, which wait for compilers more than for the GPU."""
    tools: Sequence[str] = gpu_checks.TOOLS
    recipes: Mapping[str, Sequence[str]] = gpu_runs.RECIPES


PLAN = Plan()
TINY = Plan(
    layers={
        **{f"linear-4096-4096-B{rows}": LinearShape(rows // 32, 16, 32) for rows in (256, 2048)},
        "conv2d-tiny": Conv2dShape(2, 8, 4, 8, 8, (3, 3), padding=(1, 1)),
    },
    divergence_weights=4096,
    copied_bytes=1 << 20,
    packed_linear={(64, 1): 1.0, (64, 64): 1.0},
    packed_conv2d=(8, 8, 3, 8, 2),
    networks={"lenet5": gpu_networks.NETWORKS["lenet5"]._replace(training=2, inference=(1, 2))},
    references=("lenet5",),
    tests=("tests/test_text.py",),
    select="escaped",
    processes=1,
    tools=("memcheck",),
    recipes={"lenet5-digits": ("--pretrain-epochs", "0", "--deterministic-epochs", "0", "--epochs", "1")},
)
"""The same kinds of rows from next to nothing, to try the stages out without a GPU."""


class Setting(NamedTuple):
    """What tasks are made for."""

    plan: Plan
    meter: Meter
    ours: str
    """The backend whose training ops are measured."""
    runs: Path
    """The folder of training runs."""
    data: Path
    """The folder of the data sets."""
    seconds_left: Callable[[], float]
    """Of the stage."""
    environment: Mapping[str, str]
    """Of training runs, beside the process's own."""


def smoke(setting: Setting) -> Iterator[Task]:
    """What is there, and every op once against the reference."""
    yield Task("backends", _backend_rows)
    for op in (*gpu_checks.PACKED, *gpu_checks.OPS):
        yield Task(op, partial(gpu_checks.smoke_rows, op, setting.meter))


def _backend_rows() -> Iterator[Row]:
    """Extensions that are not here, and why."""
    yield Row("backends", "cpu", said=native.MISSING or "here")
    yield Row("backends", "cuda", said=native.cuda_missing() or "here")
    yield Row("backends", "table", said=str(bqnn.backends()))


def training(setting: Setting) -> Iterator[Task]:
    """What a copy reaches, then ops of training."""
    plan, meter, ours = setting.plan, setting.meter, setting.ours
    yield Task(COPY, partial(_copy_rows, plan.copied_bytes, meter))
    for kind in gpu_training.KINDS:
        for name, shape in plan.layers.items():
            yield Task(f"{kind}_{name}", partial(gpu_training.layer_rows, kind, name, shape, ours, meter))
    for op in gpu_training.DIVERGENCES:
        yield Task(op, partial(gpu_training.divergence_rows, op, plan.divergence_weights, ours, meter))


def _copy_rows(n_bytes: int, meter: Meter) -> Iterator[Row]:
    source = torch.empty(n_bytes, device=meter.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield measured(COPY, "torch", meter.costs({COPY: [lambda: target.copy_(source)]})[COPY], weight_bytes=n_bytes)


def bandwidth(rows: Sequence[Row]) -> float | None:
    """Bytes a second that a copy reads and writes; None where it was not measured."""
    copies = [(row.seconds, row.weight_bytes) for row in rows if row.case == COPY]
    return next((2 * n_bytes / seconds for seconds, n_bytes in copies if seconds and n_bytes), None)


def packed(setting: Setting) -> Iterator[Task]:
    """Packed products."""
    plan, meter = setting.plan, setting.meter
    for size, batch in plan.packed_linear:
        case = gpu_packed.linear_case(size, batch)
        yield Task(case, partial(gpu_packed.linear_rows, size, batch, meter))
    yield Task("packed_conv2d", partial(gpu_packed.conv2d_rows, plan.packed_conv2d, meter))


def networks(setting: Setting) -> Iterator[Task]:
    """Whole networks: steps first."""
    plan, meter = setting.plan, setting.meter
    for name, network in plan.networks.items():
        rows = partial(gpu_networks.training_rows, name, network, setting.ours, meter, name in plan.references)
        yield Task(f"step-{name}", rows)
    for name, network in plan.networks.items():
        for images in network.inference:
            rows = partial(gpu_networks.inference_rows, name, network, images, meter)
            yield Task(f"inference-{name}-B{images}", rows)


def tests(setting: Setting) -> Iterator[Task]:
    """pytest, then compute-sanitizer, file by file."""
    plan, left = setting.plan, setting.seconds_left
    for path in plan.tests:
        yield Task(path, lambda path=path: gpu_checks.pytest_rows(path, plan.select, plan.processes, left()))
    for tool in plan.tools:
        for path in plan.tests:
            yield Task(f"{tool} {path}", lambda tool=tool, path=path: gpu_checks.sanitizer_rows(tool, path, left()))


def runs(setting: Setting) -> Iterator[Task]:
    """Training by the command."""
    for recipe, options in setting.plan.recipes.items():

        def rows(recipe: str = recipe, options: Sequence[str] = options) -> Iterator[Row]:
            return gpu_runs.run_rows(
                recipe, options, setting.runs, setting.data, setting.seconds_left(), setting.environment
            )

        yield Task(recipe, rows)


STAGES: dict[str, Callable[[Setting], Iterator[Task]]] = {
    stage.__name__: stage for stage in (smoke, training, packed, networks, tests, runs)
}


def finish(device: torch.device) -> None:
    """Waits for what a task has begun, and gives back the memory that it has left, so that the next one's peak is its
    own.

    Raises:
        RuntimeError: the GPU does nothing any more.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
