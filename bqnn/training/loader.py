"""Data that somebody else iterates: batches of (inputs, target) from a DataLoader, a list, or anything like them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from bqnn.core.check import check_int, named
from bqnn.core.inputs import to_device

MOST_SAMPLES = 2**62


class Size(NamedTuple):
    """Of data that training goes through once an epoch."""

    samples: int
    batches: int


def check_loader(name: str, data: Any) -> None:
    """Raises unless ``data`` can be iterated again and again."""
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, str, dict)):
        raise TypeError(f"{name} must be an iterable of batches (inputs, target), got {named(data)}")
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name} must begin anew every epoch, as a DataLoader or a list of batches does, got an iterator, "
            f"{type(data).__name__}, which ends once"
        )


def batches_of(name: str, data: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """The batches, on ``device``.

    Raises:
        TypeError: one of them is not a pair of inputs and a target with a dimension for the samples.
    """
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            parts = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
            raise TypeError(f"{name} must yield pairs (inputs, target), got {type(batch).__name__}{parts}")
        inputs, target = batch
        if not isinstance(target, Tensor) or not target.dim():
            got = "a scalar tensor" if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"{name} must yield targets that are tensors [batch, ...], got {got}")
        yield to_device(inputs, device), to_device(target, device)


def measure(name: str, data: Iterable[Any], dataset_size: int | None) -> Size:
    """How large the data is: what its length and its data set say, else counted by going through it once.

    Args:
        dataset_size: the number of samples, where somebody knows it.

    Raises:
        TypeError, ValueError: there is no batch or no sample, ``dataset_size`` is no number of samples, or a batch is
            not a pair.
    """
    if dataset_size is not None:
        check_int("dataset_size", dataset_size, 1, MOST_SAMPLES)
    samples, batches = dataset_size or samples_of(data), _length_of(data)
    if samples is None or batches is None:
        sizes = [len(target) for _, target in batches_of(name, data, torch.device("cpu"))]
        samples, batches = sum(sizes) if samples is None else samples, len(sizes)
    if not samples or not batches:
        raise ValueError(f"{name} must have a batch and a sample at least, got {batches} and {samples}")
    return Size(samples, batches)


def samples_of(data: Any) -> int | None:
    """How many samples it has in an epoch; None where it does not say."""
    # It is one part of a data set that such a sampler draws from.
    sampler = getattr(data, "sampler", None)
    if isinstance(data, DataLoader) and isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    return _length_of(getattr(data, "dataset", None))


def _length_of(value: Any) -> int | None:
    """Its length; None where it has none: a DataLoader of a stream says so only when it is asked."""
    try:
        return len(value)
    except TypeError:
        return None
