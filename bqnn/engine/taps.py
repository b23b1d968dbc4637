"""Whether the code of a network only calls a module, or may also look inside it.

What stands between two modules of an nn.Sequential is seen by whoever walks it: a forward pass that iterates, slices or
indexes it, or hands it to a function. Only the bytecode tells, since a network's code may have no source. It is read
cautiously: whatever is not plainly a call of the module counts as a look inside.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# With them code reaches modules whose names it does not say.
_DYNAMIC = frozenset(
    ("getattr", "vars", "eval", "exec", "locals", "children", "named_children", "modules", "named_modules", "_modules")
) | frozenset(("get_submodule", "__dict__", "__getattr__", "__getattribute__", "attrgetter", "methodcaller"))
_OF_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "LOAD_SUPER_ATTR")


class Names:
    """What the forward passes of some modules do with attributes.

    Args:
        modules: those of a network. The code of those without modules in them reaches none: what else refers to a
            module is for the caller to find.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.called_only: set[str] = set()
        """Attributes that are called wherever they are read."""
        self.dynamic = False
        """Whether some code reaches modules in a way that names do not show."""
        read: set[str] = set()
        for kind in {type(module) for module in modules if module._modules and not is_sequential(module)}:
            if kind.forward is nn.Module.forward:  # a container, which can not be called
                continue
            for code in _codes(kind):
                if code is None:
                    self.dynamic = True
                else:
                    self._read(code, read)
        self.called_only -= read

    def _read(self, code: types.CodeType, read: set[str]) -> None:
        instructions = list(dis.get_instructions(code))
        own = code.co_varnames[0] if code.co_argcount else None
        self.dynamic |= own in code.co_cellvars or any(name in _DYNAMIC for name in code.co_names)
        for instruction, following in zip(instructions, [*instructions[1:], None]):
            name, value = instruction.opname, instruction.argval
            if name == "LOAD_METHOD" or (name == "LOAD_ATTR" and _is_method_load(instruction)):
                self.called_only.add(value)
            elif name == "LOAD_ATTR":
                read.add(value)
            elif name.startswith("LOAD_FAST") and own in (value if isinstance(value, tuple) else (value,)):
                # The module itself is handed on, unless an attribute of it is next.
                alone = not isinstance(value, tuple) and following is not None
                self.dynamic |= not (alone and following.opname in _OF_ATTRIBUTES)  # type: ignore[union-attr]


def is_sequential(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.Sequential that runs as one: its children in their order."""
    return (
        isinstance(module, nn.Sequential)
        and "forward" not in module.__dict__
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and type(module).__call__ is nn.Module.__call__
    )


def _is_method_load(instruction: dis.Instruction) -> bool:
    """From Python 3.12 on the lowest bit of the argument says that a call follows; before, the instruction's name."""
    return sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)


def _codes(kind: type) -> Iterator[types.CodeType | None]:
    """The code of a class's forward pass and of its methods that it mentions, with all nested code; None for code that
    can not be read."""
    waiting: list[Any] = [kind.__dict__.get(name) or getattr(kind, name) for name in ("forward", "__call__")]
    waiting = [each for each in waiting if each is not nn.Module.__call__]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (staticmethod, classmethod)):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting += [each for each in (value.fget, value.fset) if each is not None]
        elif isinstance(value, types.FunctionType):
            waiting.append(value.__code__)
            waiting += [cell.cell_contents for cell in value.__closure__ or () if _has_function(cell)]
        elif isinstance(value, types.CodeType):
            yield value
            waiting += [constant for constant in value.co_consts if isinstance(constant, types.CodeType)]
            for name in value.co_names:
                waiting += [base.__dict__[name] for base in _own_bases(kind) if name in base.__dict__]
        elif not isinstance(value, type) and (callable(value) or hasattr(value, "__get__")):
            yield None


def _has_function(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # empty
        return False


def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base not in (nn.Module, object)]
