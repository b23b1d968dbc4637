"""Metadata: what a file says of the images that its network takes and of the classes that it tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from bqnn.core.check import check_int, named
from bqnn.core.files import FormatError

FIELD = "data"
"""Of what a file has beside its tensors: the fields of a :class:`Metadata` that are known."""
MOST = 65_536  # classes, channels, pixels a side: what built-in networks may have
LONGEST_NAME = 1000  # characters
LARGEST, SMALLEST_STD = 1e6, 1e-6  # of mean and std, with pixels in 0..1


@dataclass(frozen=True)
class Metadata:
    """What a network was trained on, as far as who runs it on images has to know it. What is not known is None.

    Args:
        dataset: the name of the data set.
        classes: the names of the classes, each another one, in the order of the logits.
        in_channels: of the images; 1 is grey, 3 is RGB. None: as many as ``mean`` has numbers.
        image_size: pixels a side of the images, which are squares.
        mean, std: of each channel, with pixels in 0..1: the network takes (image - mean) / std.

    Raises:
        TypeError: a field has another type.
        ValueError: a name is empty, comes twice or is longer than 1,000 characters; a number is out of its range;
            ``mean`` and ``std`` are not both given, or not of as many channels as there are.
    """

    dataset: str | None = None
    classes: tuple[str, ...] | None = None
    in_channels: int | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "mean", "std"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.dataset is not None:
            _check_name("dataset", self.dataset)
        for each in self.classes or ():
            _check_name("a name of classes", each)
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must have names of their own, got {named(self.classes)}")
        for name in ("in_channels", "image_size"):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, 1, MOST)
                object.__setattr__(self, name, int(value))
        for name, least in (("mean", -LARGEST), ("std", SMALLEST_STD)):
            values = getattr(self, name)
            if values is not None:
                numbers = tuple(_number(name, value, least) for value in values)
                object.__setattr__(self, name, numbers)
        lengths = [None if values is None else len(values) for values in (self.mean, self.std)]
        if lengths[0] != lengths[1]:
            raise ValueError(f"mean and std must be given together, of the same channels, got {lengths} numbers")
        if self.mean is not None and self.in_channels is None:
            object.__setattr__(self, "in_channels", lengths[0])
        if self.mean is not None and lengths[0] != self.in_channels:
            raise ValueError(f"mean and std must have {self.in_channels} numbers, one a channel, got {lengths[0]}")

    def known(self) -> dict[str, Any]:
        """The fields that are not None, JSON-able."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }

    def fitted(
        self, in_channels: int | None = None, image_size: int | None = None, num_classes: int | None = None
    ) -> Metadata:
        """These metadata with the sizes of the network that they are of, where these are known.

        Raises:
            ValueError: they are of other sizes.
        """
        sizes: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size}
        for name, size in sizes.items():
            if size is not None and getattr(self, name) not in (None, size):
                raise ValueError(f"{name} must be that of the network, {size}, got {getattr(self, name)}")
        if num_classes is not None and self.classes is not None and len(self.classes) != num_classes:
            raise ValueError(f"classes must have {num_classes} names, one a logit, got {len(self.classes)}")
        return replace(self, **{name: size for name, size in sizes.items() if size is not None})


def read_fields(content: Any) -> Metadata:
    """The metadata with the known fields ``content``, as a file has them.

    Raises:
        FormatError: they are not what :meth:`Metadata.known` gives.
    """
    if not isinstance(content, Mapping) or not content:
        raise FormatError(f"{FIELD} must be an object with what is known of the data, got {content!r:.80}")
    if unknown := set(content) - {each.name for each in fields(Metadata)}:
        raise FormatError(f"{FIELD} has the unknown field {min(unknown)!r:.80}")
    if nothing := [name for name, value in content.items() if value is None]:
        raise FormatError(f"{nothing[0]} of {FIELD} must be known or left out, got None")
    try:
        return Metadata(**content)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{FIELD}: {error}") from error


def _as_tuple(name: str, values: Any) -> tuple[Any, ...] | None:
    if values is None:
        return None
    unordered = isinstance(values, (Mapping, Set))
    if unordered or isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a list, got {named(values)}")
    found = tuple(values)
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"{name} must have from 1 to {MOST} entries, got {len(found)}")
    return found


def _check_name(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, got {named(text)}")
    if not 1 <= len(text) <= LONGEST_NAME:
        raise ValueError(f"{what} must have from 1 to {LONGEST_NAME} characters, got {len(text)}")


def _number(name: str, value: Any, least: float) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be numbers, got {named(value)}")
    if not least <= value <= LARGEST:  # neither is NaN
        raise ValueError(f"{name} must be from {least:g} to {LARGEST:g}, got {named(value)}")
    return float(value)
