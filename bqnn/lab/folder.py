"""What a run's folder holds, by name."""

from __future__ import annotations

METADATA = "run"  # what model.safetensors keeps recipe and factory under


SPLITS = ("test", "validation")


CHECKPOINT, WEIGHTS, METRICS = "checkpoint.pt", "model.safetensors", "metrics.json"


def print_now(line: str) -> None:
    """Prints a line at once, so that a redirected run can be watched."""
    print(line, flush=True)
