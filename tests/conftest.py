"""What holds for every test: memory that nobody wrote is NaN, and nothing in the environment forces a backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from tests.support.command import Command, Result
from tests.support.shapes import INTERPRETED


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fills torch.empty and its kin with NaN, or the largest integer, so that a forgotten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch rounds a float32 convolution's operands to TF32 unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BQNN_BACKEND", raising=False)


@pytest.fixture(autouse=True, scope="session")
def rates_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured rates are shared by the tests of a process, and are not those of the machine's user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BQNN_CACHE", str(tmp_path_factory.mktemp("rates")))
        yield


@pytest.fixture(autouse=True)
def interpreted_bfloat16() -> Iterator[None]:
    """Where kernels are interpreted, makes Triton compute with bfloat16 numbers and not with their bits."""
    if not INTERPRETED:
        yield
        return
    pytest.importorskip("triton")
    from tests.support.interpreter import bfloat16_is_right

    with bfloat16_is_right():
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_before() -> None:
    """Each file starts without compiled code: Dynamo gives up on a function that others have had compiled too often."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; every argument becomes a string."""
    from bqnn.cli import main as cli  # most tests have no use for all that it imports

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return command
