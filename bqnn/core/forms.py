"""Which layers are composed of others: the one table of them, for who converts a network and for who reads a file."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bqnn.core.attention import ComposedAttention
from bqnn.core.composed import Composed, composing
from bqnn.core.recurrent import ComposedGRU, ComposedLSTM, ComposedRNN
from bqnn.core.references import copy_network
from bqnn.core.transposed import ComposedConv1D, ComposedConvTranspose1d, ComposedConvTranspose2d

COMPOSED: dict[type[nn.Module], type[Composed]] = {
    nn.MultiheadAttention: ComposedAttention,
    nn.LSTM: ComposedLSTM,
    nn.GRU: ComposedGRU,
    nn.RNN: ComposedRNN,
    nn.ConvTranspose1d: ComposedConvTranspose1d,
    nn.ConvTranspose2d: ComposedConvTranspose2d,
}


def is_conv1d_of_transformers(kind: type) -> bool:
    """Whether it is the linear layer of GPT-2, which is not imported for that."""
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def composed_form(kind: type[nn.Module]) -> type[Composed] | None:
    """The composed form of a class, or of the class of torch's that it is one of; None where there is none."""
    if issubclass(kind, Composed):
        return None
    if any(is_conv1d_of_transformers(each) for each in kind.__mro__):
        return ComposedConv1D
    return next((form for plain, form in COMPOSED.items() if issubclass(kind, plain)), None)


def with_parts(net: nn.Module, layers: Iterable[str]) -> nn.Module:
    """``net``, or, where ``layers`` names parts of layers that are torch's own in it, a copy with these composed.

    The copy has modules of its own and the tensors of ``net``, but for those that parts have in another form.

    Args:
        net: any network.
        layers: names of layers, as a file has them.
    """
    wanted = set(layers)
    found: dict[str, type[Composed]] = {}
    for name, module in net.named_modules():
        form, prefix = composed_form(type(module)), f"{name}." if name else ""
        if form is not None and any(prefix + part in wanted for part in form.PARTS):
            found[name] = form
    if not found:
        return net
    net = copy_network(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})
    with composing({net.get_submodule(name): form for name, form in found.items()}):
        return net
