"""The tensor that ``weight`` of a quantized layer is: read, it is the quantized weight; written, it changes the means.

Code that reads a layer's weight past the layer's forward pass (fast paths, functional attention, tied embeddings) has
to see the weight that the layer computes with. And what it writes must not be lost in a temporary.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class WeightOwner(Protocol):
    """A layer whose weight is computed from other tensors."""

    def weight_sources(self) -> tuple[Any, ...]:
        """What the weight is computed from; layers for which that is the same share the weight.

        Layers with modes are among it: a replica has the tensors of the original and may be in another mode.
        """

    def weight_value(self) -> Tensor:
        """The weight as the layer computes with it now, with gradients where the layer has them."""

    def weight_like(self) -> Tensor:
        """A tensor with the weight's shape, dtype, device, gradient and ``requires_grad``, made without arithmetic."""

    def weight_target(self) -> Tensor:
        """What a change of the weight in place changes; RuntimeError where nothing may. (After a TypeError Python would
        take ``weight *= 2`` for ``weight = weight * 2``.)"""

    def freeze_weight(self, requires_grad: bool) -> None:
        """``weight.requires_grad_``."""


class _Step(NamedTuple):
    """One view of a view: ``function(tensor, *arguments, **options)``, of several results the one at ``part``."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    part: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.function(tensor, *self.arguments, **self.options)
        return result if self.part is None else result[self.part]


# Views of the weight are views of what a write changes. Everything else that is read is a tensor of its own.
_VIEWS = re.compile(
    "detach|alias|view|view_as|reshape|reshape_as|flatten|unflatten|ravel|t|transpose|swapaxes|swapdims|permute|adjoint"
    "|movedim|moveaxis|unsqueeze|squeeze|select|narrow|expand|expand_as|diagonal|unfold|unbind|chunk|split|hsplit|vsplit"
    "|dsplit|tensor_split|split_with_sizes|__getitem__"
)
_VIEW_ATTRIBUTES = re.compile("T|mT|H|mH|real")
_METADATA = re.compile(
    "size|dim|ndimension|numel|nelement|element_size|is_floating_point|is_complex|is_signed|get_device|__len__"
    "|stride|is_contiguous|storage_offset|has_names|is_pinned|is_shared"
    "|register_hook|register_post_accumulate_grad_hook|retain_grad"
)
_IN_PLACE = re.compile(
    "__(setitem|iadd|isub|imul|itruediv|ifloordiv|imod|ipow|iand|ior|ixor|ilshift|irshift)__|.*[^_]_"
)


class ComputedWeight(Tensor):
    """The weight of a quantized layer, computed whenever it is read.

    Shape, dtype, device, ``requires_grad`` and ``grad`` are answered without computing it. A function of it takes its
    value: the quantized weight, a new sample where the layer samples, with straight-through gradients where the layer
    has them. An in-place function, on it or on a view of it, changes what the layer computes it from, or raises
    RuntimeError where that can not be changed.
    """

    _owner: WeightOwner
    _path: tuple[_Step, ...]

    def __new__(cls, owner: WeightOwner, path: tuple[_Step, ...] = ()) -> ComputedWeight:
        with torch.no_grad():
            like = _follow(path, owner.weight_like())
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self._owner, self._path = owner, path
        return self

    def value(self) -> Tensor:
        """The weight, or this view of it, as a plain tensor."""
        return _follow(self._path, self._owner.weight_value())

    def _like(self) -> Tensor:
        return _follow(self._path, self._owner.weight_like())

    def _target(self) -> Tensor:
        return _follow(self._path, self._owner.weight_target())

    def _view(self, step: _Step) -> ComputedWeight:
        return ComputedWeight(self._owner, (*self._path, step))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        first = args[0] if args else next((options[key] for key in ("input", "tensor", "self") if key in options), None)
        if isinstance(first, ComputedWeight):
            if name == "__get__":
                return first._read_attribute(func, attribute)
            if name == "__set__":
                return first._write_attribute(func, attribute, args[1])
            if name == "requires_grad_":
                return first._set_requires_grad(*args[1:], **options)
            if _METADATA.fullmatch(name):
                return func(first._like(), *args[1:], **options)
            if _VIEWS.fullmatch(name) and args:
                return first._views(func, tuple(args[1:]), options)
        if isinstance(options.get("out"), ComputedWeight):
            values = _values((tuple(args), {key: each for key, each in options.items() if key != "out"}))
            func(*values[0], **{**values[1], "out": options["out"]._target()})
            return options["out"]
        if _IN_PLACE.fullmatch(name) and _holds_weight(first):
            return _write(func, first, args, options)
        values, options = _values((tuple(args), options))
        result = func(*values, **options)
        if isinstance(first, ComputedWeight) and values:
            if _is_alias(result, values[0]):
                return first._view(_Step(func, values[1:], options, None))
            if name in ("numpy", "__array__"):
                return result.copy()
        return result

    def _read_attribute(self, func: Callable[..., Any], attribute: str) -> Any:
        if attribute == "data":
            return self._view(_Step(Tensor.detach, (), {}, None))
        if _VIEW_ATTRIBUTES.fullmatch(attribute):
            return self._view(_Step(func, (), {}, None))
        return func(self._like())

    def _write_attribute(self, func: Callable[..., Any], attribute: str, value: Any) -> None:
        if attribute == "requires_grad":
            self._set_requires_grad(value)
        elif attribute == "data":
            target, value = self._target(), _values(value)
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise ValueError(
                    f"weight.data must stay {target.dtype} of the shape {list(target.shape)}, "
                    f"got {value.dtype} of the shape {list(value.shape)}"
                )
            with torch.no_grad():
                target.copy_(value)
        else:
            func(self._target(), value)

    def _set_requires_grad(self, requires_grad: bool = True) -> Tensor:
        if self._path:  # of a view, as of a detached tensor, it makes a new leaf
            return self.value().detach().clone().requires_grad_(requires_grad)
        self._owner.freeze_weight(requires_grad)
        return self

    def _views(self, func: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        arguments, options = _values((arguments, options))
        with torch.no_grad():
            result = func(self._like(), *arguments, **options)
        if isinstance(result, Tensor):
            return self._view(_Step(func, arguments, options, None))
        return tuple(self._view(_Step(func, arguments, options, i)) for i in range(len(result)))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"weight of a quantized layer can not be given to {func}: it has no memory of its own")

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ComputedWeight:
        return ComputedWeight(copy.deepcopy(self._owner, memo), self._path)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds the value."""
        return self.value().detach().clone().__reduce_ex__(protocol)


_weights: weakref.WeakValueDictionary[tuple[int, ...], ComputedWeight] = weakref.WeakValueDictionary()


def weight_of(owner: WeightOwner) -> Tensor:
    """The weight of a layer: one object for all that share its sources, so that ``a.weight is b.weight`` says whether
    two layers are tied. While torch.compile, torch.export or torch.jit traces, the plain value."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return owner.weight_value()
    sources = owner.weight_sources()
    key = tuple(map(id, sources))
    weight = _weights.get(key)
    if weight is None or any(a is not b for a, b in zip(sources, weight._owner.weight_sources(), strict=True)):
        weight = _weights[key] = ComputedWeight(owner)
    return weight


def _follow(path: tuple[_Step, ...], tensor: Tensor) -> Tensor:
    for step in path:
        tensor = step(tensor)
    return tensor


def _values(arguments: Any) -> Any:
    """``arguments`` with values for weights: one for each, however often it is among them."""
    values: dict[int, Tensor] = {}

    def value(weight: ComputedWeight) -> Tensor:
        owner = weight._owner
        if id(owner) not in values:
            values[id(owner)] = owner.weight_value()
        return _follow(weight._path, values[id(owner)])

    return tree_map_only(ComputedWeight, value, arguments)


def _is_alias(result: Any, value: Tensor) -> bool:
    """Whether a function gave back the memory of its argument, which a layer may keep."""
    if type(result) is not Tensor:
        return False
    return result is value or (result._base is not None and (result._base is value or result._base is value._base))


def _holds_weight(first: Any) -> bool:
    elements = first if isinstance(first, (list, tuple)) else [first]
    return any(isinstance(element, ComputedWeight) for element in elements)


def _write(func: Callable[..., Any], first: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """An in-place function, of which ``first`` is what it changes: a weight, or a list with some."""
    target = tree_map_only(ComputedWeight, ComputedWeight._target, first)
    if args:
        result = func(target, *_values(tuple(args[1:])), **_values(options))
    else:
        result = func(**{key: target if value is first else _values(value) for key, value in options.items()})
    return None if result is None else first
