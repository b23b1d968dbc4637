"""save, load and info: packed and compiled networks in files. bqnn.files.container describes the bytes.

The metadata of a packed network has ``version``; ``factory``, name and arguments of a built-in network, or null;
``layers``, for each packed layer ``kind``, ``shape`` of the dense weight, ``num_levels`` and, where they differ from
the usual, ``granularity``, ``relu`` and the geometry of a convolution; and ``alias``, names of tensors that are stored
under another one. A layer has the tensors ``codes`` and ``levels``, and may have ``bias`` and ``chances``.
``ensemble`` is the number of networks, where there are several; bqnn.files.members says what names they have then.
bqnn.files.compiled describes the metadata of a compiled network.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bqnn import models
from bqnn.core.check import check_precision
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.files import FormatError, open_regular, write_atomically
from bqnn.core.forms import with_parts
from bqnn.core.readers import with_readers
from bqnn.core.text import shown
from bqnn.core.wrappers import unwrapped
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import compiled, container
from bqnn.files.container import Contents
from bqnn.files.layer_spec import PARTS, check_spec, check_tensors, describe, tensor_name
from bqnn.files.members import FIELD, check_members, count_of, members, of_member
from bqnn.files.skeleton import built_in, check_model, difference, fill
from bqnn.packed.base import check_execution
from bqnn.packed.weight import PackedWeight

__all__ = ["FormatError", "info", "load", "save"]


def save(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a packed or compiled network to ``path``: to a file beside it, which then takes its place in one step.

    A :class:`bqnn.Ensemble` of packed networks of one architecture is written into one file, what several of them have
    bit for bit once.

    A compiled network is written as its graphs, and is loaded without any Python of its own. What torch.compile,
    DataParallel, DistributedDataParallel and AveragedModel put around a network, or around modules of it, is left out.
    What is written has passed the checks of :func:`load`.

    Raises:
        ValueError: ``net`` has no packed layer, a state that is no plain tensor with data (the message names it), or is
            a built-in network that has been changed: without its attribute ``factory`` it is saved as one of your own;
            networks of an ensemble have different architectures; torch runs a part of a compiled ``net`` (the message
            names the nodes).
        OSError: the file can not be written; what was at ``path`` is still there.
    """
    net = unwrapped(net)
    if isinstance(net, CompiledNetwork):
        _save_compiled(net, path)
        return
    networks = list(net) if isinstance(net, Ensemble) else [net]
    if not all(any(isinstance(module, PackedWeight) for module in network.modules()) for network in networks):
        raise ValueError("net must have a packed layer, in an ensemble each network, as bqnn.pack makes them, got none")
    layers = {
        name: module for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, PackedWeight)
    }
    tensors, alias = _stored_tensors(net)
    factory = getattr(networks[0], "factory", None)
    metadata: dict[str, Any] = {
        "factory": factory if isinstance(factory, tuple) and factory[:1] and factory[0] in models.NAMES else None,
        "layers": {name: describe(layer) for name, layer in layers.items()},
    }
    if isinstance(net, Ensemble):
        metadata[FIELD] = len(networks)
    if alias:
        metadata["alias"] = alias
    blob = container.to_bytes(tensors, metadata)
    contents = container.read(io.BytesIO(blob))
    try:
        _check_metadata(contents)
        for member, network in zip(members(contents), networks, strict=True):
            with of_member(member):
                check_model(member, network)
    except FormatError as error:
        raise ValueError(f"net can not be saved so that bqnn.load gives it back: {shown(str(error))}") from error
    for member, network in zip(members(contents), networks, strict=True):
        with of_member(member):
            _check_architecture(member, networks[0])
            if metadata["factory"] is not None:
                _check_factory(member, network)
    _write(path, blob)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    precision: str = "fp32",
    execution: str = "auto",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network in a file that :func:`save` wrote, in evaluation mode. Nothing is unpickled.

    The file is held against the network as a whole before anything of its size is allocated. Modules and tensors that
    are one in the network have to be one in the file; what is one in the file alone is copied. Layers that are tied in
    both share their codes, and another module with the weight of a layer reads the decoded one.

    The file of an ensemble gives a :class:`bqnn.Ensemble`; ``model`` is one of its networks.

    A compiled network is as it was compiled, on the CPU: its file takes no model, and has its own precision.

    Args:
        path: the file.
        model: a network with the same modules, packed or not, whose tensors' values do not matter; it is copied, not
            changed; what torch.compile and the like put around it is left out. A built-in network needs none.
        precision: "fp32", "bf16" or "int8", as for bqnn.pack; a file serves each of them.
        execution: "auto", "packed" or "dense", as for bqnn.pack.
        device: where the network is put.

    Raises:
        FormatError: the file is damaged or not one of these, or does not fit ``model``; names the tensor.
        ValueError: the file is of no built-in network and ``model`` is missing, or of a compiled one and it is given; a
            wrong ``precision`` or ``execution``. Also for a closure, a default argument, a weak reference or a class
            that refers to a module of ``model``, since it would still do so in the copy.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    check_precision(precision)
    check_execution(execution)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with _read(path) as contents:
        if compiled.KEY in contents.metadata:
            if model is not None or torch.device(device).type != "cpu":
                raise ValueError("model must be None and device the CPU for the file of a compiled network")
            return compiled.build(contents)
        skeletons = [_skeleton(contents)] * (count_of(contents) or 1)
        if model is not None:
            skeletons = _held_against(contents, unwrapped(model))
        networks = []
        for member, skeleton in zip(members(contents), skeletons, strict=True):
            if skeleton is None:
                raise ValueError(f"model must be given: {shown(os.fsdecode(path))} does not hold a built-in network")
            with of_member(member):
                networks.append(fill(member, skeleton, precision, execution))
        return (networks[0] if count_of(contents) is None else Ensemble(networks)).eval().to(device)


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds. It is checked as by :func:`load`, but for the values of tensors, and against no model.

    Returns:
        ``version``; ``bytes`` of the file, the sum of ``header_bytes`` and those of the tensors; ``networks``, 1 or
        those of an ensemble; ``factory``, of each of them; ``layers``, by name the file's own description, ``bytes`` of
        codes, levels and bias, ``bits_per_weight``, codes only, and ``posterior_bytes``, of the chances, 0 where there
        is no posterior; ``tensors``, by name ``dtype``, ``shape`` and ``bytes``. The bytes of a tensor that several
        layers have are the first one's. Layers of a compiled network are the nodes that multiply; those with dense
        weights have the ``num_levels`` 0.

    Raises:
        FormatError: the file is damaged or not one of these.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    with _read(path) as contents:
        if compiled.KEY in contents.metadata:
            net = compiled.build(contents)
            networks = net.num_networks if isinstance(net, Stacked) else 1
            return _description(contents, networks, None, compiled.layers(net))
        _skeleton(contents)
        contents.check_tensors()
    metadata = contents.metadata
    entries = contents.by_name()
    counted: set[str] = set()
    layers = {}
    for name, spec in metadata["layers"].items():
        sizes = dict.fromkeys(PARTS, 0)
        for part in PARTS:
            tensor = tensor_name(name, part)
            stored = contents.stored_as(tensor)
            if tensor in entries and stored not in counted:
                counted.add(stored)
                sizes[part] = entries[tensor].end - entries[tensor].begin
        codes = entries[tensor_name(name, "codes")]
        bits = 8 * (codes.end - codes.begin) / math.prod(spec["shape"])
        posterior = sizes.pop("chances")
        layers[name] = {**spec, "bytes": sum(sizes.values()), "bits_per_weight": bits, "posterior_bytes": posterior}
    return _description(contents, count_of(contents) or 1, metadata["factory"], layers)


def _description(
    contents: Contents, networks: int, factory: list[Any] | None, layers: dict[str, Any]
) -> dict[str, Any]:
    """What :func:`info` says of a file."""
    return {
        "version": contents.metadata["version"],
        "bytes": contents.file_bytes,
        "header_bytes": contents.header_bytes,
        "networks": networks,
        "factory": factory,
        "layers": layers,
        "tensors": {
            name: {"dtype": entry.dtype, "shape": entry.shape, "bytes": entry.end - entry.begin}
            for name, entry in contents.entries.items()
        },
    }


def _save_compiled(net: CompiledNetwork, path: str | os.PathLike[str]) -> None:
    blob = container.to_bytes(*compiled.describe(net))
    try:
        compiled.build(container.read(io.BytesIO(blob)))
    except FormatError as error:
        raise ValueError(f"net can not be saved so that bqnn.load gives it back: {shown(str(error))}") from error
    _write(path, blob)


def _write(path: str | os.PathLike[str], blob: bytes) -> None:
    write_atomically(os.fsdecode(path), lambda temporary: Path(temporary).write_bytes(blob))


def _check_architecture(contents: Contents, first: nn.Module) -> None:
    """Raises ValueError where what is to be read into ``first``, a network of an ensemble, does not fit it."""
    try:
        check_model(contents, first)
    except FormatError as error:
        raise ValueError(f"must have the architecture of network 0, but {shown(str(error))}") from error


def _check_factory(contents: Contents, net: nn.Module) -> None:
    """Raises ValueError where a built-in network has been changed, so that its factory makes another one."""
    try:
        made = built_in(contents.metadata["factory"], len(contents.by_name()))
        check_model(contents, made)
        changed = difference(made, net)
        reason = None if changed is None else f"module {changed!r} is another"
    except FormatError as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"net must be what its attribute factory makes, but {shown(reason)}; del net.factory to save it as a "
            "network of your own, for which bqnn.load needs a model"
        )


def _stored_tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of ``net`` on the CPU, each tensor once, and the other names of those that have several.

    Of an ensemble tensors are one that have the same bits, too.
    """
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
        value = value.detach().resolve_conj().resolve_neg()  # whose bytes are other numbers than they stand for
        value = value.cpu().clone(memory_format=torch.contiguous_format)
        same = first_names.setdefault(_bits(value), name) if isinstance(net, Ensemble) and value.numel() else name
        first_names[place] = same
        if same == name:
            tensors[name] = value
        else:
            alias[name] = same
    return tensors, alias


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors with the same bits have in common, and others do not."""
    data = tensor.view(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.sha256(data.data).digest()


@contextlib.contextmanager
def _read(path: str | os.PathLike[str]) -> Iterator[Contents]:
    """The file at ``path``, open, its header checked. Puts the path in front of the message of a FormatError."""
    with open_regular(path) as source:
        try:
            yield container.read(source)
        except FormatError as error:
            raise FormatError(f"{os.fsdecode(path)}: {shown(str(error))}") from error


def _skeleton(contents: Contents) -> nn.Module | None:
    """Checks all but the values of a packed network's file; returns the network that it names, on the meta device."""
    _check_metadata(contents)
    factory = contents.metadata["factory"]
    if factory is None:
        return None
    parts = members(contents)
    skeleton = built_in(factory, len(parts[0].by_name()))
    for part in parts:
        with of_member(part):
            check_model(part, skeleton)
    if list(skeleton.factory) != factory:
        raise FormatError(f"factory must have all arguments, as {skeleton.factory}, got {factory!r:.200}")
    return skeleton


def _held_against(contents: Contents, model: nn.Module) -> list[nn.Module | None]:
    """For each network of the file what it is read into: ``model``, which has been checked against it."""
    found: list[nn.Module | None] = []
    for member in members(contents):
        layers = member.metadata["layers"]
        skeleton = with_readers(with_parts(model, layers), layers)
        with of_member(member):
            check_model(member, skeleton)
        found.append(skeleton)
    return found


def _check_metadata(contents: Contents) -> None:
    """Raises FormatError unless the metadata has the form that :func:`save` gives it; its CRC-32 has been checked."""
    metadata, entries = contents.metadata, contents.entries
    if unknown := set(metadata) - {"version", "factory", "layers", "alias", FIELD}:
        raise FormatError(f"the metadata has the unknown field {min(unknown)!r}")
    if missing := {"factory", "layers"} - set(metadata):
        raise FormatError(f"the metadata must have the field {min(missing)!r}")
    factory, layers, alias = metadata["factory"], metadata["layers"], metadata.get("alias", {})
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
    by_name = contents.by_name()
    for name, spec in layers.items():
        check_tensors(name, spec, by_name)
    check_members(contents)
