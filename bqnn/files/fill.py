"""The network of a file: a copy of a skeleton with the file's layers and tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.core.files import FormatError
from bqnn.core.product import PRODUCT_LAYERS
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, rebind
from bqnn.engine.relu import relu_after
from bqnn.files import bayes_spec, packed_spec
from bqnn.files.container import Contents, Entry
from bqnn.files.fields import FROZEN
from bqnn.files.layer_spec import is_bayes
from bqnn.files.product_spec import tensor_name
from bqnn.files.skeleton import held_tensors, other_state
from bqnn.packed.base import PackedLayer
from bqnn.packed.weight import PackedWeight

Modules = Mapping[nn.Module, Any]


def fill(contents: Contents, skeleton: nn.Module, precision: str, execution: str) -> nn.Module:
    """A copy of ``skeleton`` with the file's layers and tensors in it; check_model has passed both.

    A ReLU that a packed layer does itself is left out. Floating-point tensors have the file's dtype. Where there are
    Bayes layers, the file says which parameters require a gradient; else they do as those of the skeleton.

    Raises:
        FormatError: a tensor is damaged, or has a value that no layer can have; names the tensor.
    """
    specs, entries = contents.metadata["layers"], contents.by_name()
    learning = _learning(contents, entries)
    relus = relu_after(skeleton, (*PRODUCT_LAYERS, PackedLayer))
    # copy_network takes what this holds for the copy. The tensors of the layers, which the copy has no use for, are not
    # copied, and none stays.
    replacements: dict[int, Any] = {}
    names: dict[nn.Module, str] = {}
    layers: dict[nn.Module, PackedWeight | BayesLayer] = {}
    for name in specs:
        module = skeleton.get_submodule(name)
        if names.setdefault(module, name) == name:
            layers[module] = _layer(contents, name, entries, learning, precision, execution)
            replacements |= {id(tensor): tensor for _, tensor in held_tensors(module)}
    others = {id(tensor): name for name, tensor in other_state(skeleton, specs).items()}
    for _, tensor in held_tensors(skeleton):
        if id(tensor) in others:
            replacements[id(tensor)] = _other(contents, others[id(tensor)], tensor, learning)
    _share_codes(contents, names, layers)
    net = copy_network(skeleton, replacements)
    twins = dict(zip(skeleton.modules(), net.modules(), strict=True))
    _put_in(net, twins, names, layers, relus)
    _share_posteriors(contents, skeleton, twins, names)
    return net


def _learning(contents: Contents, entries: Mapping[str, Entry]) -> Mapping[str, bool] | None:
    """By the name of a tensor, whether it requires a gradient as a parameter; None where the file does not say."""
    if FROZEN not in contents.metadata:
        return None
    frozen = frozenset(contents.metadata[FROZEN])
    return {name: contents.prefix + name not in frozen for name in entries}


def _layer(
    contents: Contents,
    name: str,
    entries: Mapping[str, Entry],
    learning: Mapping[str, bool] | None,
    precision: str,
    execution: str,
) -> PackedWeight | BayesLayer:
    """The layer ``name`` of the file, which has the tensors ``entries``."""
    spec = contents.metadata["layers"][name]

    def part(kind: str) -> Tensor | None:
        full = tensor_name(name, kind)
        return contents.tensor(contents.stored_as(full)) if full in entries else None

    if learning is not None and is_bayes(spec):
        return bayes_spec.build_layer(name, spec, part, lambda kind: learning[tensor_name(name, kind)])
    return packed_spec.build_layer(name, spec, part, precision, execution)


def _other(contents: Contents, name: str, target: Tensor, learning: Mapping[str, bool] | None) -> Tensor:
    """The tensor ``name`` of the file, which is of no layer, as what ``target`` is in the skeleton."""
    value = contents.tensor(contents.stored_as(name))
    value = value if target.is_meta else value.to(target.device)
    if not isinstance(target, nn.Parameter):
        return value
    if learning is None:
        return nn.Parameter(value, target.requires_grad)
    return nn.Parameter(value, learning[name] and (value.is_floating_point() or value.is_complex()))


def _share_codes(contents: Contents, names: Mapping[nn.Module, str], layers: Modules) -> None:
    """Lets packed layers share codes, levels and chances that are one in the skeleton and in the file."""
    firsts: dict[tuple[Any, ...], PackedWeight] = {}
    tables: dict[tuple[Any, ...], Tensor] = {}
    for module, packed in layers.items():
        if not isinstance(packed, PackedWeight):
            continue
        weight = module.weight
        codes, levels, chances = (
            contents.stored_as(tensor_name(names[module], kind)) for kind in ("codes", "levels", "chances")
        )
        first = firsts.setdefault((weight, codes, levels), packed)
        packed.codes, packed.levels = first.codes, first.levels
        if packed.chances is not None:
            packed.chances = tables.setdefault((weight, chances), packed.chances)


def _put_in(
    net: nn.Module, twins: Modules, names: Mapping[nn.Module, str], layers: Modules, relus: Mapping[int, nn.ReLU]
) -> None:
    """Turns the modules of ``net`` into ``layers``, with all that refers to them.

    Args:
        net: a copy of the skeleton.
        twins: for its modules those of the copy.
        names, layers: for its layers their names, and those of the file.
        relus: by the id of one of its layers the ReLU that a packed one does itself.
    """
    methods = bound_methods(net, {twins[module]: name for module, name in names.items()})
    for module, layer in layers.items():
        made = twins[module]
        become(made, layer, made)
        if isinstance(made, PackedLayer) and made.relu and id(module) in relus:
            relu = twins[relus[id(module)]]
            become(relu, nn.Identity(), relu)  # the layer's own does, and another would cost time
            made.take_over(relu)
    rebind(methods)


def _share_posteriors(contents: Contents, skeleton: nn.Module, twins: Modules, names: Mapping[nn.Module, str]) -> None:
    """Ties Bayes layers whose posterior is one in the skeleton and in the file, and what else has their means.

    Raises:
        FormatError: another module has the weight of a layer in the skeleton, and not in the file.
    """
    specs = contents.metadata["layers"]
    own = {module: name for module, name in names.items() if is_bayes(specs[name])}
    weights = {id(weight): module for module in own if (weight := module._parameters.get("weight")) is not None}
    for path, module in skeleton.named_modules():
        for name, parameter in module._parameters.items():
            if module not in names and id(parameter) in weights:
                layer = weights[id(parameter)]
                one, other = tensor_name(path, name), tensor_name(own[layer], "weight")
                if contents.stored_as(one) != contents.stored_as(other):
                    raise FormatError(f"tensors {one!r} and {other!r} are one in the model and two in the file")
                twins[layer].give_to(twins[module], name)
    groups: dict[tuple[Any, ...], list[BayesLayer]] = {}
    for module, name in own.items():
        stored = (contents.stored_as(tensor_name(name, part)) for part in bayes_spec.SHARED)
        groups.setdefault((module.weight, *stored), []).append(twins[module])
    for group in groups.values():
        if len(group) > 1:
            group[0].tie(tuple(group))
    bayes_spec.set_estimators({twins[module]: specs[name] for module, name in own.items()})
