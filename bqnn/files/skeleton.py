"""The network that a file is read into: held against the file as a whole before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bqnn import models
from bqnn.core.files import FormatError
from bqnn.files.container import DTYPES, Contents, Entry
from bqnn.files.layer_spec import LAYERS, check_fits, needed_of, parts_of
from bqnn.files.product_spec import PLAIN_LAYERS, tensor_name

CREATORS = frozenset({torch.empty, torch.ones, torch.zeros, torch.tensor})  # what modules make their tensors with
FREE_TENSORS = 256  # as many are made in no time: of a network of another size than the file's, the layer is named


class _Budget(TorchFunctionMode):
    """Inside, a thread may make ``count`` tensors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.made = count, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in CREATORS
        if self.made > self.count:
            raise FormatError("it asks for far more tensors than there are")
        return func(*args, **(kwargs or {}))


def built_in(factory: Sequence[Any], most_tensors: int) -> models.Network:
    """The built-in network of ``factory``, name and arguments, on the meta device, where it takes no memory.

    Raises:
        FormatError: there is no such network, or it has far more than ``most_tensors`` tensors; it is then given up, so
            that a small file can not ask for a network that takes long to make.
    """
    try:
        with torch.device("meta"), _Budget(most_tensors + FREE_TENSORS):
            return models.build(*factory)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"factory: {error}") from error


def difference(made: nn.Module, net: nn.Module) -> str | None:
    """The name of the first module of a quantized ``net`` that is not what it is in ``made``, or is in two places.

    None where there is none; "" where it is the network itself. Shapes and geometry are for :func:`check_model`.
    """
    theirs, mine = (dict(each.named_modules(remove_duplicate=False)) for each in (made, net))
    first: dict[int, str] = {}
    for name in (*theirs, *mine):
        if name not in theirs or name not in mine or not _alike(theirs[name], mine[name]):
            return name
        if first.setdefault(id(mine[name]), name) != name:
            return name
    return None


def _alike(made: nn.Module, mine: nn.Module) -> bool:
    """Whether ``mine`` is the module ``made``, quantized or not."""
    if isinstance(mine, LAYERS):
        return isinstance(made, PLAIN_LAYERS)
    if isinstance(made, nn.ReLU) and type(mine) is nn.Identity:
        return True  # the layer before it does the work
    return type(made) is type(mine) and "forward" not in vars(mine) and _settings(made) == _settings(mine)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, texts and the like that a module keeps, by the names of its attributes."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, plain)
    }


def check_model(contents: Contents, skeleton: nn.Module) -> int:
    """Holds a network against a file whose metadata are checked: modules, names, shapes, dtypes and what is shared.

    Returns:
        The bytes that the tensors of the file will take in the network, at most: where it has one layer, or tensor,
        under several names, they are counted once.

    Raises:
        FormatError: they do not fit; names the layer or tensor.
        ValueError: the network has a state that no file can fill.
    """
    specs, entries, stored_as = contents.metadata["layers"], contents.by_name(), contents.stored_as
    first: dict[int, str] = {}
    taken = 0
    for name, spec in specs.items():
        module = _submodule(skeleton, name, specs)
        check_fits(name, module, spec, tensor_name(name, "bias") in entries)
        same = first.setdefault(id(module), name)
        stored = [_stored_parts(contents, layer, spec, entries) for layer in (same, name)]
        if stored[0] != stored[1] or specs[same] != spec:
            raise FormatError(f"layers {same!r} and {name!r} are one in the model and two in the file")
        if same == name:
            taken += sum(contents.entries[each].size for each in stored[0] if each is not None)
    others = other_state(skeleton, specs)
    needed = {*others, *_tensors_of(specs, entries)}
    if missing := sorted(needed - set(entries)):
        raise FormatError(f"tensor {missing[0]!r} is missing ({len(missing)} of {len(needed)} that the model has)")
    if unexpected := sorted(set(entries) - needed):
        raise FormatError(f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} that the model does not have)")
    first.clear()
    for name, target in others.items():
        value, dtype = entries[name], DTYPES[entries[name].dtype]
        if list(target.shape) != value.shape:
            raise FormatError(f"tensor {name!r} has shape {value.shape}; the model needs {list(target.shape)}")
        if target.dtype != dtype and not (target.is_floating_point() and dtype.is_floating_point):
            raise FormatError(f"tensor {name!r} is {dtype}; the model needs {target.dtype}")
        same = first.setdefault(id(target), name)
        if target.numel() and stored_as(same) != stored_as(name):
            raise FormatError(f"tensors {same!r} and {name!r} are one in the model and two in the file")
        taken += value.size if same == name else 0
    return taken


def _stored_parts(
    contents: Contents, layer: str, spec: Mapping[str, Any], entries: Mapping[str, Entry]
) -> list[str | None]:
    """The names under which the tensors that a layer may have are stored; None for one that is not in ``entries``."""
    names = [tensor_name(layer, part) for part in parts_of(spec)]
    return [contents.stored_as(name) if name in entries else None for name in names]


def _submodule(skeleton: nn.Module, name: str, specs: Mapping[str, Any]) -> nn.Module:
    try:
        module = skeleton.get_submodule(name)
    except AttributeError as error:
        raise FormatError(f"layer {name!r} is in the file and not in the model") from error
    if outer := [layer for layer in _above(name) if layer in specs]:
        raise FormatError(f"layer {name!r} is inside layer {outer[0]!r}")
    return module


def _above(name: str) -> Iterator[str]:
    """The names of the modules that hold the module, or tensor, ``name``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _tensors_of(specs: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    """The names of the layers' tensors, of those that must be there and of others that are."""
    return [
        name
        for layer, spec in specs.items()
        for part in parts_of(spec)
        if (name := tensor_name(layer, part)) in entries or part in needed_of(spec)
    ]


def other_state(net: nn.Module, specs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``net`` outside the layers of a file, by their names in its state.

    Raises:
        ValueError: a state is no parameter or buffer, or a buffer that is not saved has no data.
    """
    held = {id(tensor) for _, tensor in held_tensors(net)}
    others = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if any(layer in specs for layer in _above(name)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"the state {name!r} of model must be a tensor, got {type(value).__name__}")
        if id(value) not in held:
            raise ValueError(f"the state {name!r} of model must be a parameter or a buffer; it is made when asked for")
        others[name] = value
    saved = {id(tensor) for tensor in others.values()}
    for name, tensor in held_tensors(net):
        if tensor.is_meta and id(tensor) not in saved and not any(layer in specs for layer in _above(name)):
            raise ValueError(f"model must hold data in the buffer {name!r}, which is not saved, got one on meta")
    return others


def held_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer of ``net`` with its name, one that several modules hold with each."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)
