"""What is made of tensors once, and kept for as long as they live and stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` has been changed in place, as autograd counts it. An inference tensor is not counted: a
    change of one goes unnoticed, as does one through ``tensor.data``."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)  # a NamedTuple is not generic before Python 3.11
class _Entry(Generic[T]):
    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    value: T


class Derived(Generic[T]):
    """A function of tensors and further arguments, hashable ones, that remembers its values.

    A value is dropped where one of its tensors dies, and made again where one has been changed in place. Tensors are
    told apart by identity. What asks for a value holds the tensors and not the value: nothing is pickled with it.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._entries: dict[Any, _Entry[T]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], *arguments: Any) -> T:
        key = (*map(id, tensors), arguments)
        versions = tuple(map(version_of, tensors))
        entry = self._entries.get(key)
        if entry is not None and entry.versions == versions:
            if all(source() is tensor for source, tensor in zip(entry.sources, tensors)):
                return entry.value
        # An inference tensor, made in a first call under inference_mode, could not serve later calls outside it.
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(*tensors, *arguments)

        def forget(_: Any) -> None:
            self._entries.pop(key, None)

        self._entries[key] = _Entry(tuple(weakref.ref(tensor, forget) for tensor in tensors), versions, value)
        return value

    def __len__(self) -> int:
        return len(self._entries)
