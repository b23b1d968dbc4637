"""The compiled networks of a run's packed file: made of it, written beside it and found there again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from bqnn.core.text import shown
from bqnn.data.splits import Splits, batches, normalise
from bqnn.engine.compile import compile
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import network
from bqnn.files.metadata import Metadata

COMPILED = ("fp32", "int8")
"""The precisions that packed networks are compiled for."""
CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 128


def compiled_path(packed: Path, precision: str) -> Path:
    """The file of the compiled network beside a packed one."""
    return packed.with_name(f"{packed.name.removesuffix('.safetensors')}.compiled-{precision}.safetensors")


def calibration(data: Splits) -> list[Tensor]:
    """A few batches of the training images, without augmentation; the same at every call."""
    drawn = batches(data.train, CALIBRATION_BATCH, torch.Generator().manual_seed(0), shuffle=True)
    return [normalise(images, data.mean, data.std) for images, _ in islice(drawn, CALIBRATION_BATCHES)]


def save_compiled(
    net: nn.Module,
    packed: Path,
    example: Tensor,
    given: Callable[[], list[Tensor]],
    metadata: Metadata | None = None,
) -> dict[str, CompiledNetwork | str]:
    """Compiles a packed network for each of :data:`COMPILED`, and writes the files beside its own.

    Args:
        net: the packed network, on the CPU.
        packed: its file.
        example: an input, float32 [batch, C, H, W].
        given: makes the calibration batches of "int8".
        metadata: of the packed network, as :func:`bqnn.save` takes them.

    Returns:
        by precision the network, or in a line why it has no file: it can not be captured, torch runs a part of it, or
        there are no images to calibrate on. A file that an earlier call has left in its place is then removed.

    Raises:
        OSError: a file can not be written.
    """
    found: dict[str, CompiledNetwork | str] = {}
    for precision in COMPILED:
        path = compiled_path(packed, precision)
        fast = _compiled(net, example, precision, given)
        if isinstance(fast, CompiledNetwork):
            try:
                network.save(fast, path, metadata)
            except ValueError as error:
                fast = shown(str(error))
        if isinstance(fast, str):
            path.unlink(missing_ok=True)
        found[precision] = fast
    return found


def _compiled(
    net: nn.Module, example: Tensor, precision: str, given: Callable[[], list[Tensor]]
) -> CompiledNetwork | str:
    try:
        images = given() if precision == "int8" else None
    except (ValueError, OSError, ImportError) as error:
        return f"no images to calibrate on: {shown(str(error))}"
    try:
        return compile(net, example, precision=precision, calibration=images)
    except (TypeError, ValueError) as error:
        return shown(str(error))


def remove_compiled(packed: Path) -> None:
    """Removes the compiled networks beside a packed file, which are of the one that was there before."""
    for precision in COMPILED:
        compiled_path(packed, precision).unlink(missing_ok=True)


def load_compiled(packed: Path) -> dict[str, nn.Module]:
    """The compiled networks beside a packed file, by precision; raises as :func:`bqnn.load` does."""
    paths = {precision: compiled_path(packed, precision) for precision in COMPILED}
    return {precision: network.load(path) for precision, path in paths.items() if path.exists()}
