"""``python -m bench.host_time``: what the host takes for a training op, without a GPU, in times of an ordinary layer.

Everything up to a launch is done as it would be on a GPU, on CPU tensors, and kernels do nothing (tests/support/
launches.py); what torch does on tensors is done, so that layers are small. Times are of the process, not of the clock,
and the least of many repeats, since what else runs can only make a call longer. What a driver takes for a launch is not
in them, two to four microseconds, and the ordinary layer's, of float32, have its small products in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import RESULTS, describe_cpu
from bqnn import ops
from bqnn.bayes.options import SLAB_SHARE, SPIKE_WIDTH
from bqnn.core.codebook import raw_from_levels
from bqnn.core.product import channels_last
from bqnn.ops.codebook_from_raw import codebook_from_raw
from tests.support.helpers import make_case
from tests.support.launches import gpu_stands_in
from tests.support.shapes import Conv2dShape, LinearShape

REPEATS, CALLS = 60, 5
NUM_LEVELS, SEED = 3, 20261
SHAPES = {"linear": LinearShape(32, 64, 64), "conv2d": Conv2dShape(2, 32, 12, 6, 6, (3, 3), padding=(1, 1))}
"""Small: a fused linear layer; a convolution whose weight is sampled before it, as those of a large batch are."""
RATIOS = {"sample_linear": 2.5, "moment_linear": 2.5, "sample_conv2d": 2.0, "moment_conv2d": 2.0}
"""How many times the ordinary layer's time forward and backward pass may take."""
TABLE = RESULTS / "host_time.json"

Call = Callable[[], object]


class Op(NamedTuple):
    """An op's forward pass, and with its backward pass; the ordinary layer's, where there is one."""

    forward: Call
    step: Call
    ordinary: Call | None = None


def product_op(name: str) -> Op:
    """sample_linear and the like, in bfloat16 activations."""
    kind, product = name.split("_")
    shape: Any = SHAPES[product]
    case, seed = make_case(shape, NUM_LEVELS, "tensor").leaves(), torch.tensor(SEED)
    function, options = getattr(ops, name), {"coarse_variance": True} if kind == "moment" else {}
    x = channels_last(case.x.detach().bfloat16()).requires_grad_()
    grad = channels_last(torch.randn(case.output_shape).bfloat16())
    tensors = x, case.weight, case.log_sigma2, case.levels, case.thresholds, case.bias, seed
    ordinary = [channels_last(case.x.detach()).requires_grad_(), case.weight, case.bias]

    def forward() -> Tensor:
        return function(*tensors, **options, **case.geometry)

    return Op(
        forward,
        lambda: torch.autograd.grad(forward(), [*tensors[:4], case.bias], grad),
        lambda: torch.autograd.grad(case.product(*ordinary), ordinary, grad.float()),
    )


def divergence_op(name: str) -> Op:
    """spike_slab_kl or mixture_kl."""
    case = make_case(SHAPES["linear"], NUM_LEVELS, "tensor").leaves()
    leaves = [case.weight, case.log_sigma2, case.levels]
    spikes: tuple[Any, ...] = (torch.full_like(case.levels, 0.1),)
    prior = spikes if name == "spike_slab_kl" else (torch.full((), 0.25), SPIKE_WIDTH, SLAB_SHARE)

    def forward() -> Tensor:
        return getattr(ops, name)(*leaves, *prior)

    return Op(forward, lambda: torch.autograd.grad(forward(), leaves))


def codebook_op() -> Op:
    levels = torch.tensor([[-0.2, 0.0, 0.3]])
    scale = levels.std(1, keepdim=True)
    raw = raw_from_levels(levels, scale).requires_grad_()

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return codebook_from_raw(raw, scale, None)

    def step() -> object:
        levels, thresholds, _ = forward()
        return torch.autograd.grad([levels, thresholds], [raw], [levels.detach(), thresholds.detach()])

    return Op(forward, step)


def least_seconds(call: Call, repeats: int) -> float:
    """Of the process, for one call: the least of so many repeats."""
    for _ in range(CALLS):
        call()  # this plans, binds and allocates for the first time
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        found.append((time.process_time() - start) / CALLS)
    return min(found)


def rows(names: Sequence[str], repeats: int = REPEATS) -> list[dict[str, Any]]:
    """What each op takes, in microseconds, and its launches."""
    found = []
    with gpu_stands_in() as launched:
        for name in names:
            op = OPS[name]()
            op.step()
            launched.clear()
            op.step()
            row: dict[str, Any] = {"op": name, "launches": len(launched)}
            row |= {"forward": least_seconds(op.forward, repeats), "step": least_seconds(op.step, repeats)}
            if op.ordinary is not None:
                row["ordinary step"] = least_seconds(op.ordinary, repeats)
            micro = {key: round(1e6 * value, 1) if isinstance(value, float) else value for key, value in row.items()}
            if op.ordinary is not None:
                micro |= {"ratio": round(row["step"] / row["ordinary step"], 2), "asked": RATIOS[name]}
            found.append(micro)
    return found


OPS: dict[str, Callable[[], Op]] = {
    **{name: lambda name=name: product_op(name) for name in RATIOS},
    **{name: lambda name=name: divergence_op(name) for name in ("spike_slab_kl", "mixture_kl")},
    "codebook_from_raw": codebook_op,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(OPS)}; all where none is")
    parser.add_argument("--save", metavar="NAME", help=f"keep the table under this name in {TABLE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(options.ops or list(OPS))
    for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        save(options.save, found, TABLE)


def save(name: str, found: list[dict[str, Any]], path: Path) -> None:
    """Puts a table into the file, beside those of other names."""
    before = json.loads(path.read_text()) if path.exists() else {}
    tables = {**before, name: {"machine": describe_cpu(), "rows": found}}
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
