"""save, load and info: networks in files. bqnn.files.container describes the bytes.

The metadata of a packed network, or of one with Bayes layers, has ``version``; ``factory``, name and arguments of a
built-in network, or null; ``layers``, for each quantized layer ``kind``, ``shape`` of the dense weight, ``num_levels``
and, where they differ from the usual, the geometry of a convolution, and of a packed layer ``granularity`` and
``relu``; and ``alias``, names of tensors that are stored under another one. A packed layer has the tensors ``codes``
and ``levels``, and may have ``bias`` and ``chances``; bqnn.files.bayes_spec says what a Bayes layer has, and ``frozen``
names the parameters of its network that require no gradient. ``ensemble`` is the number of networks, where there are
several; bqnn.files.members says what names they have then. ``data`` is what is known of the images and classes, in the
file of a compiled network too, whose other metadata bqnn.files.compiled describes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bqnn import models
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import bayes_layers
from bqnn.core.check import check_precision
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.files import FormatError, open_regular, write_content
from bqnn.core.forms import with_parts
from bqnn.core.readers import with_readers
from bqnn.core.text import shown
from bqnn.core.wrappers import unwrapped
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import bayes_spec, compiled, container
from bqnn.files.container import Contents
from bqnn.files.fields import FROZEN, check_fields
from bqnn.files.fill import fill
from bqnn.files.layer_spec import LAYERS, describe, is_bayes
from bqnn.files.members import FIELD, check_memory, count_of, members, of_member
from bqnn.files.metadata import FIELD as DATA
from bqnn.files.metadata import Metadata, read_fields
from bqnn.files.sizes import layer_sizes
from bqnn.files.skeleton import built_in, check_model, difference
from bqnn.files.state import frozen_parameters, stored_tensors
from bqnn.packed.base import check_execution

SIZES = ("in_channels", "image_size", "num_classes")
"""The arguments that the factory of each built-in network has."""

__all__ = ["FormatError", "Metadata", "info", "load", "save"]


def save(net: nn.Module, path: str | os.PathLike[str], metadata: Metadata | None = None) -> None:
    """Writes a packed, Bayesian or compiled network to ``path``: to a file beside it, which takes its place at once.

    A network with Bayes layers is written with its posterior, its options and which parameters require a gradient: what
    is loaded predicts, and trains on, to the same bits. An optimizer has a state of its own, for which
    :func:`bqnn.fit` has checkpoints.

    A :class:`bqnn.Ensemble` of networks of one architecture is written into one file, what several of them have bit for
    bit once.

    A compiled network is written as its graphs, and is loaded without any Python of its own. What torch.compile,
    DataParallel, DistributedDataParallel and AveragedModel put around a network, or around modules of it, is left out.
    What is written has passed the checks of :func:`load`.

    Args:
        net: the network.
        path: the file.
        metadata: what is known of the images that it takes, and the names of its classes, for :func:`info` and for
            `bqnn predict` and `bqnn eval`.

    Raises:
        TypeError: ``metadata`` is another object.
        ValueError: ``net`` has no packed or Bayes layer, a parameter of a Bayes layer that is not finite, a state that
            is no plain tensor with data (the message names it), or is a built-in network that has been changed: without
            its attribute ``factory`` it is saved as one of your own; networks of an ensemble have different
            architectures; torch runs a part of a compiled ``net`` (the message names the nodes); ``metadata`` are of
            other sizes than ``net``.
        OSError: the file can not be written; what was at ``path`` is still there.
    """
    if metadata is not None and not isinstance(metadata, Metadata):
        raise TypeError(f"metadata must be a bqnn.Metadata or None, got {type(metadata).__name__}")
    known = {} if metadata is None else metadata.known()
    data = {DATA: known} if known else {}
    net = unwrapped(net)
    if isinstance(net, CompiledNetwork):
        tensors, described = compiled.describe(net)
        blob = container.to_bytes(tensors, described | data)
        with _can_be_loaded():
            contents = container.read(io.BytesIO(blob))
            _data_of(contents, compiled.sizes_of(compiled.build(contents)))
        write_content(os.fsdecode(path), blob)
        return
    networks = list(net) if isinstance(net, Ensemble) else [net]
    if not all(any(isinstance(module, LAYERS) for module in network.modules()) for network in networks):
        raise ValueError(
            "net must have a Bayes or a packed layer, in an ensemble each network, as bqnn.convert and bqnn.pack make "
            "them, got none"
        )
    _check_values(net)
    blob = container.to_bytes(*_described(net, networks[0], data))
    contents = container.read(io.BytesIO(blob))
    with _can_be_loaded():
        check_fields(contents)
        _check_models(contents, networks)
        _data_of(contents, _sizes_of(contents.metadata["factory"]))
    for member, network in zip(members(contents), networks, strict=True):
        with of_member(member):
            _check_architecture(member, networks[0])
            if contents.metadata["factory"] is not None:
                _check_factory(member, network)
    write_content(os.fsdecode(path), blob)


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
    both share their codes, or their posterior, and another module with the weight of a layer reads what that computes
    with.

    The file of an ensemble gives a :class:`bqnn.Ensemble`; ``model`` is one of its networks.

    A compiled network is as it was compiled, on the CPU: its file takes no model, and has its own precision.

    Args:
        path: the file.
        model: a network with the same modules, quantized or not, whose tensors' values do not matter; it is copied, not
            changed; what torch.compile and the like put around it is left out. A built-in network needs none.
        precision: of packed layers "fp32", "bf16" or "int8", as for bqnn.pack; a file serves each of them.
        execution: of packed layers "auto", "packed" or "dense", as for bqnn.pack.
        device: where the network is put.

    Raises:
        FormatError: the file is damaged or not one of these, or does not fit ``model``; names the tensor.
        ValueError: the file is of no built-in network and ``model`` is missing, or of a compiled one and it is given; a
            wrong ``precision`` or ``execution``, or another than the default for a file without packed layers. Also for
            a closure, a default argument, a weak reference or a class that refers to a module of ``model``, since it
            would still do so in the copy.
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
            return _compiled(contents)
        skeletons = [_skeleton(contents)] * (count_of(contents) or 1)
        if model is not None:
            skeletons = _held_against(contents, unwrapped(model))
        if (precision, execution) != ("fp32", "auto") and all(map(is_bayes, contents.metadata["layers"].values())):
            raise ValueError(
                f"precision and execution are for packed layers, which {shown(os.fsdecode(path))} has none of; "
                f"got {precision!r} and {execution!r}"
            )
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
        those of an ensemble; ``factory``, of each of them; ``metadata``, a :class:`bqnn.Metadata`, with sizes that
        follow from the network; ``compiled``, the precision of a compiled network, else None; ``layers``, by name the
        file's own description, ``bytes`` of codes, levels and bias, ``bits_per_weight``, codes only, and
        ``posterior_bytes``, of the chances, 0 where there is no posterior; ``tensors``, by name ``dtype``, ``shape``
        and ``bytes``. The bytes of a tensor that several layers have are the first one's. Of a Bayes layer, whose
        description has ``bayes``, the posterior are the variances. Layers of a compiled network are the nodes that
        multiply; those with dense weights have the ``num_levels`` 0.

    Raises:
        FormatError: the file is damaged or not one of these.
        OSError: the file can not be read; FileNotFoundError where there is none.
    """
    with _read(path) as contents:
        if compiled.KEY in contents.metadata:
            net = _compiled(contents)
            networks = net.num_networks if isinstance(net, Stacked) else 1
            layers, data = compiled.layers(net), _data_of(contents, compiled.sizes_of(net))
            precision: str | None = net.precision
        else:
            _skeleton(contents)
            contents.check_tensors()
            networks, layers = count_of(contents) or 1, layer_sizes(contents)
            data, precision = _data_of(contents, _sizes_of(contents.metadata["factory"])), None
        return {
            "version": contents.metadata["version"],
            "bytes": contents.file_bytes,
            "header_bytes": contents.header_bytes,
            "networks": networks,
            "factory": contents.metadata.get("factory"),
            "metadata": data,
            "compiled": precision,
            "layers": layers,
            "tensors": {
                name: {"dtype": entry.dtype, "shape": entry.shape, "bytes": entry.size}
                for name, entry in contents.entries.items()
            },
        }


def _described(net: nn.Module, first: nn.Module, data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a network, or of an ensemble with the network ``first``, and its metadata."""
    layers = {name: module for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, LAYERS)}
    tensors, alias = stored_tensors(net)
    factory = getattr(first, "factory", None)
    metadata: dict[str, Any] = {
        "factory": factory if isinstance(factory, tuple) and factory[:1] and factory[0] in models.NAMES else None,
        "layers": {name: describe(layer) for name, layer in layers.items()},
    }
    if isinstance(net, Ensemble):
        metadata[FIELD] = net.num_networks
    if alias:
        metadata["alias"] = alias
    if any(isinstance(layer, BayesLayer) for layer in layers.values()):
        metadata[FROZEN] = frozen_parameters(net)
    return tensors, metadata | data


def _check_values(net: nn.Module) -> None:
    """Raises ValueError, with the name of the layer, for a Bayes layer with values that no file may have."""
    for name, layer in bayes_layers(net).items():
        try:
            bayes_spec.check_values(layer)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error


@contextlib.contextmanager
def _can_be_loaded() -> Iterator[None]:
    """Inside, what load would refuse is the fault of ``net``, or of what was said of it."""
    try:
        yield
    except FormatError as error:
        raise ValueError(f"net can not be saved so that bqnn.load gives it back: {shown(str(error))}") from error


def _data_of(contents: Contents, sizes: dict[str, int]) -> Metadata:
    """What the file says of images and classes, with the sizes of its network; FormatError where they differ."""
    data = read_fields(contents.metadata[DATA]) if DATA in contents.metadata else Metadata()
    try:
        return data.fitted(**sizes)
    except ValueError as error:
        raise FormatError(f"{DATA}: {error}") from error


def _sizes_of(factory: list[Any] | None) -> dict[str, int]:
    """Sizes of images and the number of classes, which each built-in network has."""
    return {} if factory is None else {name: factory[1][name] for name in SIZES if name in factory[1]}


def _compiled(contents: Contents) -> CompiledNetwork:
    net = compiled.build(contents)
    _data_of(contents, compiled.sizes_of(net))
    return net


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
    check_fields(contents)
    factory = contents.metadata["factory"]
    if factory is None:
        return None
    parts = members(contents)
    skeleton = built_in(factory, len(parts[0].by_name()))
    _check_models(contents, [skeleton] * len(parts))
    if list(skeleton.factory) != factory:
        raise FormatError(f"factory must have all arguments, as {skeleton.factory}, got {factory!r:.200}")
    _data_of(contents, _sizes_of(factory))
    return skeleton


def _held_against(contents: Contents, model: nn.Module) -> list[nn.Module | None]:
    """For each network of the file what it is read into: ``model``, which has been checked against it."""
    found = []
    for member in members(contents):
        specs = member.metadata["layers"]
        found.append(with_readers(with_parts(model, specs), [name for name in specs if not is_bayes(specs[name])]))
    _check_models(contents, found)
    return [*found]


def _check_models(contents: Contents, models: Sequence[nn.Module]) -> None:
    """Holds each network of the file against its model, and all of them against the memory that they may take."""
    taken = 0
    for member, model in zip(members(contents), models, strict=True):
        with of_member(member):
            taken += check_model(member, model)
    check_memory(contents, taken)
