"""save, load and info: packed networks in files. bqnn.files.container describes the bytes.

The metadata has ``version``; ``factory``, name and arguments of a built-in network, or null; ``layers``, for each
packed layer ``kind``, ``shape`` of the dense weight, ``num_levels`` and, where they differ from the usual,
``granularity``, ``relu`` and the geometry of a convolution; and ``alias``, names of tensors that are stored under
another one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bqnn import models
from bqnn.core.check import check_precision
from bqnn.core.files import FormatError, write_atomically
from bqnn.core.readers import with_readers
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, rebind
from bqnn.engine.relu import relu_after
from bqnn.files import container
from bqnn.files.container import Contents
from bqnn.files.layer_spec import build_layer, check_fits, check_spec, describe, tensor_name
from bqnn.packed.base import PackedLayer, check_execution

__all__ = ["FormatError", "info", "load", "save"]


def save(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a packed network to ``path``: to a file beside it first, which then takes its place in one step.

    Raises:
        ValueError: ``net`` has no packed layer, or a state that is no plain tensor with data (the message names it).
        OSError: the file can not be written; what was at ``path`` is still there.
    """
    layers = {
        name: module for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, PackedLayer)
    }
    if not layers:
        raise ValueError("net must have a packed layer, as bqnn.pack makes them, got none")
    tensors, alias = _stored_tensors(net)
    factory = getattr(net, "factory", None)
    metadata: dict[str, Any] = {
        "factory": factory if isinstance(factory, tuple) and factory[:1] and factory[0] in models.NAMES else None,
        "layers": {name: describe(layer) for name, layer in layers.items()},
    }
    if alias:
        metadata["alias"] = alias
    blob = container.to_bytes(tensors, metadata)
    write_atomically(os.path.realpath(path), lambda temporary: Path(temporary).write_bytes(blob))


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    precision: str = "fp32",
    execution: str = "auto",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network in a file that :func:`save` wrote, in evaluation mode. Nothing is unpickled.

    Args:
        path: the file.
        model: a network with the same modules, packed or not, whose tensors' values do not matter; it is copied, not
            changed. A built-in network needs none.
        precision: "fp32", "bf16" or "int8", as for bqnn.pack; a file serves each of them.
        execution: "auto", "packed" or "dense", as for bqnn.pack.
        device: where the network is put.

    Raises:
        FormatError: the file is damaged or not one of these, or does not fit ``model``; names the tensor.
        ValueError: the file is of no built-in network and ``model`` is missing; a wrong ``precision`` or ``execution``.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    check_precision(precision)
    check_execution(execution)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blob = Path(path).read_bytes()
    with _naming(path):
        contents = container.parse(blob)
        _check_metadata(contents)
        tensors = contents.tensors()
        for name, stored in contents.metadata.get("alias", {}).items():
            tensors[name] = tensors[stored]
        specs = contents.metadata["layers"]
        layers = {name: build_layer(name, spec, tensors, precision, execution) for name, spec in specs.items()}
        skeleton = _built_in(contents.metadata["factory"]) if model is None else model
    if skeleton is None:
        raise ValueError(f"model must be given: {path} does not hold a built-in network")
    with _naming(path):
        net = _replace(skeleton, layers, tensors)
        _fill(net, tensors, layers)
    return net.eval().to(device)


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, without building the network; its bytes are checked as by :func:`load`, its values are not.

    Returns:
        ``version``; ``bytes`` of the file, the sum of ``header_bytes`` and those of the tensors; ``factory``;
        ``layers``, by name the file's own description, ``bytes`` of codes, levels and bias, and ``bits_per_weight``,
        codes only; ``tensors``, by name ``dtype``, ``shape`` and ``bytes``.

    Raises:
        FormatError: the file is damaged or not one of these.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    blob = Path(path).read_bytes()
    with _naming(path):
        contents = container.parse(blob)
        _check_metadata(contents)
    metadata, alias = contents.metadata, contents.metadata.get("alias", {})
    sizes = {name: entry.end - entry.begin for name, entry in contents.entries.items()}
    sizes_with_alias = sizes | {name: sizes[stored] for name, stored in alias.items()}
    layers = {}
    for name, spec in metadata["layers"].items():
        parts = [sizes_with_alias.get(tensor_name(name, part), 0) for part in ("codes", "levels", "bias")]
        weights = math.prod(spec["shape"])
        layers[name] = {**spec, "bytes": sum(parts), "bits_per_weight": 8 * parts[0] / weights}
    return {
        "version": metadata["version"],
        "bytes": len(blob),
        "header_bytes": contents.header_bytes,
        "factory": metadata["factory"],
        "layers": layers,
        "tensors": {
            name: {"dtype": entry.dtype, "shape": entry.shape, "bytes": sizes[name]}
            for name, entry in contents.entries.items()
        },
    }


def _stored_tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of ``net`` on the CPU, each tensor once, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the state {name!r} of net must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError(f"tensor {name!r} must be dense and hold data, got {value.layout} on {value.device}")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in first_names:
            alias[name] = first_names[place]
            continue
        first_names[place] = name
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, alias


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the path in front of the message of a FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error


def _check_metadata(contents: Contents) -> None:
    """Raises FormatError unless the metadata has the form that :func:`save` gives it; its CRC-32 has been checked."""
    metadata, entries = contents.metadata, contents.entries
    if unknown := set(metadata) - {"version", "factory", "layers", "alias"}:
        raise FormatError(f"the metadata has the unknown field {min(unknown)!r}")
    factory, layers, alias = metadata.get("factory"), metadata.get("layers"), metadata.get("alias", {})
    if factory is not None:
        if not isinstance(factory, list) or [type(part) for part in factory] != [str, dict]:
            raise FormatError(f"factory must be a name and arguments, got {factory!r:.80}")
    if not isinstance(layers, dict) or not layers:
        raise FormatError(f"layers must describe the packed layers by name, got {layers!r:.80}")
    for name, spec in layers.items():
        check_spec(name, spec)
    if not isinstance(alias, dict):
        raise FormatError(f"alias must be an object, got {alias!r:.80}")
    for name, stored in alias.items():
        if name in entries or not isinstance(stored, str) or stored not in entries:
            raise FormatError(f"tensor {name!r} is an alias of {stored!r:.80}; only the second must be stored")


def _built_in(factory: list[Any] | None) -> nn.Module | None:
    """The built-in network on the meta device: it takes no memory before the file's tensors are known to fit it."""
    if factory is None:
        return None
    try:
        with torch.device("meta"):
            return models.build(*factory)
    except (TypeError, ValueError) as error:
        raise FormatError(f"factory: {error}") from error


def _replace(skeleton: nn.Module, layers: Mapping[str, PackedLayer], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``skeleton`` with ``layers`` in it, each at its name, and without the ReLU that they have done.

    Layers that are tied in the file share their codes, and another module with the weight of one reads the decoded one.
    """
    skeleton = with_readers(skeleton, layers)
    relus = relu_after(skeleton, (nn.Linear, nn.Conv2d, PackedLayer))
    names: dict[int, str] = {}
    stored: dict[tuple[int, ...], PackedLayer] = {}
    unused: dict[int, Any] = {}
    for name, layer in layers.items():
        try:
            module = skeleton.get_submodule(name)
        except AttributeError as error:
            raise FormatError(f"layer {name!r} is in the file and not in the model") from error
        check_fits(name, module, describe(layer), layer.bias is not None)
        first = names.setdefault(id(module), name)
        if tensors[tensor_name(first, "codes")] is not tensors[tensor_name(name, "codes")]:
            raise FormatError(f"layers {first!r} and {name!r} are one in the model and two in the file")
        unused |= {id(parameter): parameter for parameter in module.parameters()}
        tied = stored.setdefault(tuple(id(tensors[tensor_name(name, part)]) for part in ("codes", "levels")), layer)
        layer.codes, layer.levels = tied.codes, tied.levels
    net = copy_network(skeleton, unused)
    methods = bound_methods(net, {net.get_submodule(name): name for name in layers})
    identities = {name: _same_in(net, skeleton, relus.get(id(skeleton.get_submodule(name)))) for name in layers}
    for name in names.values():
        packed: Any = net.get_submodule(name)
        become(packed, layers[name], packed)
        if packed.relu and (relu := identities[name]) is not None:
            become(relu, nn.Identity(), relu)  # the layer's own does, and another would cost time
            packed.take_over(relu)
    rebind(methods)
    return net


def _same_in(net: nn.Module, original: nn.Module, module: nn.Module | None) -> nn.Module | None:
    """The module of a copy that is what ``module`` is in the original."""
    return next((copied for copied, each in zip(net.modules(), original.modules()) if each is module), None)


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, PackedLayer]) -> None:
    """Gives every tensor of ``net`` outside ``layers`` its value; of floating-point dtypes, the file's counts."""
    state = net.state_dict(keep_vars=True)
    if missing := sorted(set(state) - set(tensors)):
        raise FormatError(f"tensor {missing[0]!r} is missing ({len(missing)} of {len(state)} that the model has)")
    if unexpected := sorted(set(tensors) - set(state)):
        raise FormatError(f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} that the model does not have)")
    packed = {tensor_name(name, part) for name in layers for part in ("codes", "levels", "bias")}
    others = sorted(set(state) - packed)
    for name in others:
        target, value = state[name], tensors[name]
        if not isinstance(target, Tensor):
            raise ValueError(f"the state {name!r} of model must be a tensor, got {type(target).__name__}")
        if target.shape != value.shape:
            raise FormatError(f"tensor {name!r} has shape {list(value.shape)}; the model needs {list(target.shape)}")
        both_floating = target.is_floating_point() and value.is_floating_point()
        if target.dtype != value.dtype and not both_floating:
            raise FormatError(f"tensor {name!r} is {value.dtype}; the model needs {target.dtype}")
    _materialise(net, state)
    state = net.state_dict(keep_vars=True)
    for name in others:
        state[name].data = tensors[name].to(state[name].device, copy=True)


def _materialise(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives memory on the CPU to the tensors of ``net`` that are on the meta device."""
    for name, buffer in net.named_buffers():
        if buffer.is_meta and name not in state:
            raise ValueError(f"model must hold data in the buffer {name!r}, which is not saved, got one on meta")
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
