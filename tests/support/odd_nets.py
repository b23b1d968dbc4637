"""Networks that refer to their layers, or read their weights, in other ways than by calling an attribute."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


class Net(nn.Module):
    """Two linear layers of one width; what a subclass does with them is its ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    @staticmethod
    def example() -> Tensor:
        return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))


class InList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.b, self.a]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.tanh(layer(x))
        return x


class InDictOfLists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.heads = {"one": [self.a], "two": (self.b, {"more": self.a})}

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.heads["two"]
        return self.heads["one"][0](first(x)) + rest["more"](x)


class AsKeys(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scales = {self.a: 2.0, self.b: -1.0}

    def forward(self, x: Tensor) -> Tensor:
        return sum(scale * layer(x) for layer, scale in self.scales.items())


class BoundMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.more = self.a.forward, [self.b.__call__]

    def forward(self, x: Tensor) -> Tensor:
        return self.more[0](self.project(x))


class Partial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.project = functools.partial(self.a.forward)
        self.product = functools.partial(self.apply_, layer=self.b)

    @staticmethod
    def apply_(x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.project(x))


@dataclass
class Pair:
    first: nn.Module
    second: nn.Module


class InDataclass(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair.second(torch.relu(self.pair.first(x)))


class Slots:
    __slots__ = ("layer", "unset")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class InSlots(Net):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Slots(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.holder.layer(x))


class Hooked(Net):
    """A hook, which is a method of the network, adds what another layer makes of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(self.add)

    def add(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + self.b(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class KeepsActivations(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.a(x)
        self.history = [self.hidden * 2.0]
        return self.b(self.hidden)


class Transposed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b((self.a.weight.T @ x.T + self.a.weight @ x.T).T)
        return y + x @ self.b.weight.data[:, : WIDTH // 2] @ torch.ones(WIDTH // 2, WIDTH).to(y)


class ReadsDtype(Net):
    """As T5 and others do: the activations follow the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        x = x.to(self.b.weight.device, next(iter((self.b.weight,))).dtype)
        return self.b(torch.relu(self.a(x)))


class JoinedBias(Net):
    """As Swin, BEiT and EVA do: one functional product, with a bias made of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return self.b(self.a(torch.softmax(q * k, -1) * v))


class FunctionalAttention(Net):
    """As CLIP's pooling does: linear layers as the projections of a functional attention."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, 2, None, torch.cat([self.a.bias, self.b.bias, self.v.bias]), None, None, False, 0.0,
            self.out.weight, self.out.bias, training=self.training, use_separate_proj_weight=True,
            q_proj_weight=self.a.weight, k_proj_weight=self.b.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return y.squeeze(1)


class FastPath(nn.Module):
    """nn.TransformerEncoderLayer reads the weights of its linear layers where no gradient is needed."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    example = staticmethod(lambda: torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class FunctionalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.call, self.methods = self.conv.forward, {"conv": self.conv.forward}

    example = staticmethod(lambda: torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride, self.conv.padding, groups=2)
        standard = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        return y + F.conv2d(x, standard, padding=1, groups=2) + self.methods["conv"](self.call(x))


class Tied(Net):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    example = staticmethod(lambda: torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


class TiedRows(nn.Module):
    """An embedding and a head with its weight, and nothing between them: what both read is seen in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


class TiedParameter(Net):
    """The weight is a parameter of the network and of an nn.ParameterDict, too."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = self.a.weight
        self.table = nn.ParameterDict({"b": self.b.weight, "own": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + F.linear(x, self.shared) @ self.table["b"] + self.table["own"]


class TiedDecoder(Net):
    def forward(self, x: Tensor) -> Tensor:
        code = self.b(torch.relu(self.a(x)))
        return F.linear(code, self.b.weight.t()) + F.linear(code, self.a.weight.t(), self.a.bias)


class Taps(nn.Module):
    """Walks a Sequential, and keeps what is before the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    example = staticmethod(lambda: torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.features:
            x = layer(x)
            kept.append(x)
        return torch.cat(kept, 1)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Sliced(_Block):
    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        return self.block[:1](x) - self.block(x)


class ByName(_Block):
    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - getattr(self, "bl" + "ock")[0](x)


def _first_of(block: nn.Sequential, x: Tensor) -> Tensor:
    return block[0](x)


class HandedOn(_Block):
    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - _first_of(self.block, x)


class _Whole(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class FromOutside(nn.Module):
    """The block only calls its Sequential; what is around it looks inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Whole()

    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - self.inner.block[0](x)


class ByMethod(_Block):
    example = staticmethod(Net.example)

    def before(self, x: Tensor) -> Tensor:
        walked = next(iter(self.children()))
        return next(iter(walked))(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - self.before(x)


class ByPartialMethod(_Block):
    """The code that looks inside is behind an object that is no function."""

    example = staticmethod(Net.example)

    def look(self, index: int, x: Tensor) -> Tensor:
        return self.block[index](x)

    before = functools.partialmethod(look, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - self.before(x)


class ByAlias(_Block):
    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        alias, name = self, "block"
        return self.block(x) - alias.get_submodule(name)[0](x) + alias.get_submodule(name)[0].bias


class Clipped(nn.Module):
    """Other activations than ReLU, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU6(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU())

    example = staticmethod(Net.example)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x)) - self.block(5.0 * x)


ODD_NETS: list[Callable[[], Any]] = [
    InList, InDictOfLists, AsKeys, BoundMethod, Partial, InDataclass, InSlots, Hooked, KeepsActivations, Transposed,
    ReadsDtype, JoinedBias, FunctionalAttention, FastPath, FunctionalConvolution, Tied, TiedEmbedding, TiedParameter,
    TiedDecoder, Taps, Sliced, ByName, HandedOn, FromOutside, ByMethod, ByPartialMethod,
    ByAlias, Clipped,
]  # fmt: skip


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        layer = self.a
        self.project = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.project(x))


class DefaultArgument(Net):
    def __init__(self) -> None:
        super().__init__()

        def project(x: Tensor, layer: nn.Module = self.a) -> Tensor:
            return layer(x)

        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.project(x))


class WeakReference(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reference = weakref.ref(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.reference()(x))  # type: ignore[misc]


class ClosureHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, arguments, output: output + self.b(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def on_the_class() -> Any:
    class OnTheClass(Net):
        layers: Any = None

        def __init__(self) -> None:
            super().__init__()
            type(self).layers = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.layers[0](x))

    return OnTheClass()


UNCOPIABLE_NETS: list[Callable[[], Any]] = [Closure, DefaultArgument, WeakReference, ClosureHook, on_the_class]
"""What refers to the layers stays as it is in a copy."""
