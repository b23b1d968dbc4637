"""What is seen of an epoch: while it lasts, and when it is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from bqnn.core.extras import needs
from bqnn.core.text import duration
from bqnn.training.phases import BAYES, NAMES

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """``items``, with a bar on stderr that says how many of ``total`` have been taken, until the last one is.

    Raises:
        ModuleNotFoundError: tqdm is not installed.
    """
    with needs("train"):
        from tqdm import tqdm
    return iter(tqdm(items, label, total, leave=False))


def describe(record: dict[str, Any], total: int) -> str:
    """A record of the history in one line, with the time that the rest of ``total`` epochs may take."""
    left = total - record["epoch"]
    epoch = f"{record['epoch']}/{total}"
    parts = [f"epoch {epoch:>{2 * len(str(total)) + 1}}", f"{record['phase']:<14}", f"nll {record['nll']:.4f}"]
    if record["phase"] == NAMES[BAYES]:
        parts.append(f"kl {record['kl']:,.0f} nats")
    if record["validation_error"] is not None:
        parts.append(f"validation error {record['validation_error']:.2f} %")
    if record["quantization_loss"] is not None:
        parts.append(f"quantization loss {record['quantization_loss']:.4f}")
        parts.append(f"near a level {100 * record['near_share']:.1f} %")
    parts.append(f"{record['seconds']:.1f} s")
    if left:
        parts.append(f"about {duration(left * record['seconds'])} left")
    return "  ".join(parts)
