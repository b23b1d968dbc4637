"""Declares an op: its schema, fake and autograd, and the way from the dispatcher to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.ops import dispatch


class _Eager(NamedTuple):
    """An op without the dispatcher: what runs it, and its autograd Function, if it has a gradient."""

    run: Callable[..., Any]
    function: type[torch.autograd.Function] | None


_eager: dict[str, _Eager] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def register_op(
    name: str,
    signature: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Declares ``bqnn::name`` with ``signature``, e.g. ``(Tensor x, str? backend=None) -> Tensor``.

    ``reference`` takes the arguments of the signature without ``backend``, the last positional one of each, and is
    registered as the backend "reference"; what is keyword-only follows ``backend`` and is handed on by name. The first
    tensor argument's device chooses the backend. ``setup_context``
    and ``backward`` are those of :func:`torch.library.register_autograd`; an op without them has no gradient, and
    says so when one is asked for.
    """
    qualified = f"bqnn::{name}"

    def no_backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no gradient")

    def run(*args: Any, **keywords: Any) -> Any:
        filled = (*args, *defaults[len(args) :])
        return dispatch.implementation(name, args[0].device, filled[-1])(*filled[:-1], **keywords)

    _eager[name] = _Eager(run, _function(name, run, setup_context, backward) if setup_context and backward else None)
    torch.library.define(qualified, signature)
    # The dispatcher leaves out trailing arguments that have their default value.
    arguments = getattr(torch.ops.bqnn, name).default._schema.arguments
    defaults = [argument.default_value for argument in arguments if not argument.kwarg_only]
    dispatch.register(name, "reference", reference)
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward or no_backward, setup_context=setup_context)


def _function(
    name: str, run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        # A setup_context of its own would have torch look up the signature of `forward` in every call.
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def call(name: str, *args: Any) -> Any:
    """Calls ``bqnn::name`` with all its arguments, ``backend`` included.

    In plain eager execution straight to the backend: an op's way through torch's dispatcher crosses from Python to C++
    and back three times, which costs more than a small layer's kernels. Where anything looks on (tracing, a dispatch
    mode, a function transform, a subclass of Tensor), through the dispatcher.
    """
    op = _eager[name]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not _is_plain(tensors):
        return getattr(torch.ops.bqnn, name)(*args)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return op.run(*args)
    if op.function is None:
        return getattr(torch.ops.bqnn, name)(*args)
    return op.function.apply(*args)


def _is_plain(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_function_stack():
        return False
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in tensors)
