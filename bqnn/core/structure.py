"""Arguments that belong together travel together: nested NamedTuples, and the flat arguments that a schema lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints


class Structure:
    """How values of a NamedTuple class, whose fields may be NamedTuples in their turn, become a flat list and back.

    The gradients of a call, or which of its arguments want one, have the structure of the call itself: nobody counts
    positions.

    Args:
        kind: the NamedTuple class.
        fields: for a field whose class is not the one that ``kind`` declares, the one that it has here.
    """

    def __init__(self, kind: Any, **fields: Any) -> None:
        hints = {**get_type_hints(kind), **fields}
        self.kind = kind
        self._parts = [Structure(hints[name]) if hasattr(hints[name], "_fields") else None for name in kind._fields]
        self.names: list[str] = []
        """Of the flat arguments, in order: the names of the innermost fields."""
        self._places: list[tuple[Structure | None, int, int]] = []
        """Of each field, its structure, if it has one, and from where to where its values are among the flat ones."""
        for name, part in zip(kind._fields, self._parts):
            first = len(self.names)
            self.names += [name] if part is None else part.names
            self._places.append((part, first, len(self.names)))
        self._is_flat = not any(self._parts)

    def flatten(self, value: Any) -> list[Any]:
        """The innermost values, in the order of :attr:`names`; None in place of a NamedTuple stands for all of it."""
        if self._is_flat:
            return list(value)
        flat: list[Any] = []
        for part, each in zip(self._parts, value):
            if part is None:
                flat.append(each)
            else:
                flat += [None] * len(part.names) if each is None else part.flatten(each)
        return flat

    def nest(self, flat: Sequence[Any]) -> Any:
        """The inverse of :meth:`flatten`."""
        if self._is_flat:
            return self.kind(*flat)
        return self.kind(
            *[flat[first] if part is None else part.nest(flat[first:end]) for part, first, end in self._places]
        )


def only(kind: Any, **values: Any) -> Any:
    """A NamedTuple of this class with None in all other fields: of a call's gradients, those that there are."""
    return kind._make(map(values.get, kind._fields))
