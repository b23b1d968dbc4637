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
        for name, part in zip(kind._fields, self._parts):
            self.names += [name] if part is None else part.names

    def flatten(self, value: Any) -> list[Any]:
        """The innermost values, in the order of :attr:`names`; None in place of a NamedTuple stands for all of it."""
        flat: list[Any] = []
        for part, each in zip(self._parts, value):
            if part is None:
                flat.append(each)
            else:
                flat += [None] * len(part.names) if each is None else part.flatten(each)
        return flat

    def nest(self, flat: Sequence[Any]) -> Any:
        """The inverse of :meth:`flatten`."""
        values, first = [], 0
        for part in self._parts:
            size = 1 if part is None else len(part.names)
            values.append(flat[first] if part is None else part.nest(flat[first : first + size]))
            first += size
        return self.kind(*values)


def only(kind: Any, **values: Any) -> Any:
    """A NamedTuple of this class with None in all other fields: of a call's gradients, those that there are."""
    return kind(**{name: values.get(name) for name in kind._fields})
