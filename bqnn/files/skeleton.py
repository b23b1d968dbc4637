"""The network that a packed file is read into: held against the file as a whole before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bqnn import models
from bqnn.core.files import FormatError
from bqnn.core.product import PRODUCT_LAYERS
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, rebind
from bqnn.engine.relu import relu_after
from bqnn.files.container import DTYPES, Contents
from bqnn.files.layer_spec import NEEDED, PARTS, build_layer, check_fits, tensor_name
from bqnn.packed.base import PackedLayer
from bqnn.packed.weight import PackedWeight

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
    """The name of the first module of a packed ``net`` that is not what it is in ``made``, or that is in two places.

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
    """Whether ``mine`` is the module ``made``, packed or not."""
    if isinstance(mine, PackedWeight):
        return isinstance(made, (*PRODUCT_LAYERS, nn.Embedding))
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


def check_model(contents: Contents, skeleton: nn.Module) -> None:
    """Holds a network against a file whose metadata are checked: modules, names, shapes, dtypes and what is shared.

    Raises:
        FormatError: they do not fit; names the layer or tensor.
        ValueError: the network has a state that no file can fill.
    """
    specs, entries, stored_as = contents.metadata["layers"], contents.by_name(), contents.stored_as
    first: dict[int, str] = {}
    for name, spec in specs.items():
        module = _submodule(skeleton, name, specs)
        check_fits(name, module, spec, tensor_name(name, "bias") in entries)
        same = first.setdefault(id(module), name)
        pairs = [(tensor_name(same, part), tensor_name(name, part)) for part in PARTS]
        if any(stored_as(one) != stored_as(other) for one, other in pairs) or specs[same] != spec:
            raise FormatError(f"layers {same!r} and {name!r} are one in the model and two in the file")
    others = _other_state(skeleton, specs)
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


def fill(contents: Contents, skeleton: nn.Module, precision: str, execution: str) -> nn.Module:
    """A copy of ``skeleton`` with the file's packed layers and tensors in it; :func:`check_model` has passed both.

    A ReLU that a layer does itself is left out. Floating-point tensors have the file's dtype.

    Raises:
        FormatError: a tensor is damaged, or has a value that no layer can have; names the tensor.
    """
    specs, others, entries = contents.metadata["layers"], {}, contents.by_name()
    for name, tensor in _other_state(skeleton, contents.metadata["layers"]).items():
        others[id(tensor)] = name
    relus = relu_after(skeleton, (*PRODUCT_LAYERS, PackedLayer))
    # copy_network takes what this holds for the copy. The tensors of the layers, which the copy has no use for, are not
    # copied, and none stays.
    replacements: dict[int, Any] = {}
    layers: dict[nn.Module, PackedWeight] = {}
    tied: dict[tuple[Any, ...], PackedWeight] = {}
    tables: dict[tuple[Any, ...], Tensor] = {}
    for name, spec in specs.items():
        module: Any = skeleton.get_submodule(name)
        if module in layers:
            continue

        def part(kind: str, layer: str = name) -> Tensor | None:
            full = tensor_name(layer, kind)
            return contents.tensor(contents.stored_as(full)) if full in entries else None

        layers[module] = packed = build_layer(name, spec, part, precision, execution)
        stored = (contents.stored_as(tensor_name(name, kind)) for kind in ("codes", "levels"))
        first = tied.setdefault((module.weight, *stored), packed)
        packed.codes, packed.levels = first.codes, first.levels
        if packed.chances is not None:
            stored_table = contents.stored_as(tensor_name(name, "chances"))
            packed.chances = tables.setdefault((module.weight, stored_table), packed.chances)
        replacements |= {id(tensor): tensor for _, tensor in _held(module)}
    for _, tensor in _held(skeleton):
        if id(tensor) in others:
            value = contents.tensor(contents.stored_as(others[id(tensor)]))
            value = value if tensor.is_meta else value.to(tensor.device)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            replacements[id(tensor)] = value
    return _with_layers(skeleton, copy_network(skeleton, replacements), layers, relus)


def _with_layers(
    skeleton: nn.Module, net: nn.Module, layers: Mapping[nn.Module, PackedWeight], relus: Mapping[int, nn.ReLU]
) -> nn.Module:
    """``net``, a copy of ``skeleton``, whose ``layers`` have become packed ones, with all that refers to them.

    Args:
        layers: for the layers of ``skeleton`` the packed ones.
        relus: by the id of a layer of ``skeleton`` the ReLU that a packed one does itself.
    """
    twins = dict(zip(skeleton.modules(), net.modules(), strict=True))
    names = {twins[module]: name for name, module in skeleton.named_modules() if module in layers}
    methods = bound_methods(net, names)
    for module, layer in layers.items():
        packed: Any = twins[module]
        become(packed, layer, packed)
        if isinstance(packed, PackedLayer) and packed.relu and id(module) in relus:
            relu = twins[relus[id(module)]]
            become(relu, nn.Identity(), relu)  # the layer's own does, and another would cost time
            packed.take_over(relu)
    rebind(methods)
    return net


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
    names = [(tensor_name(layer, part), part) for layer in specs for part in PARTS]
    return [name for name, part in names if part in NEEDED or name in entries]


def _other_state(net: nn.Module, specs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``net`` outside the layers of a file, by their names in its state.

    Raises:
        ValueError: a state is no parameter or buffer, or a buffer that is not saved has no data.
    """
    held = {id(tensor) for _, tensor in _held(net)}
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
    for name, tensor in _held(net):
        if tensor.is_meta and id(tensor) not in saved and not any(layer in specs for layer in _above(name)):
            raise ValueError(f"model must hold data in the buffer {name!r}, which is not saved, got one on meta")
    return others


def _held(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer of ``net`` with its name, one that several modules hold with each."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)
