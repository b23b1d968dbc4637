"""Declares an op: its schema, fake and autograd, and the way from the dispatcher to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bqnn.core.structure import Structure
from bqnn.ops import dispatch
from bqnn.ops.flops import count_flops


class _Op(NamedTuple):
    """What :func:`call` needs: how arguments are laid flat, and the op's autograd Function, if it has a gradient."""

    overload: Any
    structure: Structure
    order: list[str]
    """Of the schema: the names of its positional arguments, then of those that are keyword-only; "backend" is one."""
    positional: int
    function: type[torch.autograd.Function] | None
    transformed: type[torch.autograd.Function]
    """The same for transforms of torch.func, to which every op has a gradient, or says that it has none."""


_ops: dict[str, _Op] = {}
_PLAIN = (Tensor, torch.nn.Parameter)
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")  # of torch.autograd.grad(is_grads_batched=True)


def register_op(
    name: str,
    signature: str,
    structure: Structure,
    reference: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    save: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[[Any, Any], int] | None = None,
) -> None:
    """Declares ``bqnn::name`` with ``signature``, e.g. ``(Tensor x, str? backend=None) -> Tensor``.

    Args:
        structure: of the op's calls, a NamedTuple of all arguments but ``backend``; the names are those of the schema,
            in its order. The device of its first field, a tensor, is the op's.
        reference: call -> outputs; registered as the backend "reference", which serves every call.
        fake: call -> outputs without data.
        save: (ctx, call, outputs): keeps for ``backward`` what it needs. ``ctx.backend`` is set already.
        backward: (ctx, *gradients of the outputs) -> the gradients, in the structure of the call; None for what has
            none. ``ctx.wants`` has, in the same structure, whether each is wanted. An op without it has no gradient,
            and says so when one is asked for.
        flops: (call, outputs) -> what torch's FLOP counter counts for the call; of an op that multiplies.

    Raises:
        ValueError: schema and structure name other arguments.
    """
    qualified = f"bqnn::{name}"
    torch.library.define(qualified, signature)
    overload = getattr(torch.ops.bqnn, name).default
    arguments = overload._schema.arguments
    order = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    positional = sum(not argument.kwarg_only for argument in arguments)
    if [each for each in order if each != "backend"] != structure.names or order.count("backend") != 1:
        raise ValueError(f"the schema of {qualified} must name {structure.names} and backend, got {order}")
    where = order.index("backend")

    def nest(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        # The dispatcher leaves out trailing arguments that have their default value.
        given = {**defaults, **dict(zip(order, args)), **keywords}
        flat = [given[each] for each in order]
        return structure.nest(flat[:where] + flat[where + 1 :]), flat[where]

    def run(*args: Any, **keywords: Any) -> Any:
        return dispatch.run(name, *nest(args, keywords))

    def run_fake(*args: Any, **keywords: Any) -> Any:
        return dispatch.without_autocast(fake, nest(args, keywords)[0])

    def keep(ctx: Any, call: Any, backend: str | None, outputs: Any) -> None:
        ctx.backend = backend
        if save is not None:
            save(ctx, call, outputs)

    def gradients_of(ctx: Any, needs: tuple[bool, ...], gradients: tuple[Any, ...]) -> list[Any]:
        """In the order of the structure, as ``needs`` is."""
        if backward is None:
            raise NotImplementedError(f"{qualified} has no gradient")
        ctx.wants = structure.nest(needs)
        return structure.flatten(backward(ctx, *gradients))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        keep(ctx, *nest(inputs, keyword_only_inputs), output)

    def setup_context_of_positional(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, {}, output)

    def backward_of_op(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:positional]  # fewer, where the dispatcher leaves out trailing arguments
        flat = (*needs, *[False] * (len(order) - len(needs)))
        found = gradients_of(ctx, (*flat[:where], *flat[where + 1 :]), gradients)
        return (*found[:where], None, *found[where:])[: len(needs)]

    def forward_of_function(ctx: Any, backend: str | None, *flat: Any) -> Any:
        # A setup_context of its own would have torch look up the signature of `forward` in every call.
        call = structure.nest(flat)
        outputs = dispatch.run(name, call, backend)
        keep(ctx, call, backend, outputs)
        return outputs

    def backward_of_function(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *gradients_of(ctx, ctx.needs_input_grad[1:], gradients)

    def setup_context_of_function(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, structure.nest(inputs[1:]), inputs[0], output)

    def forward_of_transformed(backend: str | None, *flat: Any) -> Any:
        # Below all transforms; a level of forward-mode differentiation is still open, but not for these tensors.
        if _have_data([each for each in flat if isinstance(each, Tensor)]):
            return dispatch.run(name, structure.nest(flat), backend)
        return _through_dispatcher(_ops[name], list(flat), backend)

    function = None
    if backward is not None:
        methods = {"forward": staticmethod(forward_of_function), "backward": staticmethod(backward_of_function)}
        function = type(name, (torch.autograd.Function,), methods)
    methods = {
        "forward": staticmethod(forward_of_transformed),
        "setup_context": staticmethod(setup_context_of_function),
        "backward": staticmethod(backward_of_function),
        "vmap": staticmethod(lambda info, dims, *flat: _one_by_one(transformed.apply, info, dims, flat)),
    }
    transformed: Any = type(name, (torch.autograd.Function,), methods)
    _ops[name] = _Op(overload, structure, order, positional, function, transformed)
    dispatch.register(name, "reference", reference)
    if flops is not None:
        count_flops(name, lambda *args, out_val, **keywords: flops(nest(args, keywords)[0], out_val))
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, run_fake)
    torch.library.register_autograd(
        qualified,
        backward_of_op,
        setup_context=setup_context if positional < len(order) else setup_context_of_positional,
    )


def call(name: str, arguments: Any, backend: str | None = None) -> Any:
    """Calls ``bqnn::name`` with a call of its structure.

    In plain eager execution straight to the backend: an op's way through torch's dispatcher crosses from Python to C++
    and back three times, which costs more than a small layer's kernels. Where anything looks on (tracing, a dispatch
    mode, a subclass of Tensor), through the dispatcher. Transforms of torch.func take an autograd Function of their
    own: torch.vmap then calls the op for each index, and forward-mode differentiation says that there is none.
    """
    op = _ops[name]
    flat = op.structure.flatten(arguments)
    tensors = [each for each in flat if isinstance(each, Tensor)]
    if not is_plain(tensors):
        transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transforms and not torch.compiler.is_compiling():
            return op.transformed.apply(backend, *flat)
        return _through_dispatcher(op, flat, backend)
    if not (torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])):
        return dispatch.run(name, arguments, backend)
    if op.function is None:
        return _through_dispatcher(op, flat, backend)
    return op.function.apply(backend, *flat)


def _through_dispatcher(op: _Op, flat: list[Any], backend: str | None) -> Any:
    where = op.order.index("backend")
    given = [*flat[:where], backend, *flat[where:]]
    return op.overload(*given[: op.positional], **dict(zip(op.order[op.positional :], given[op.positional :])))


def _one_by_one(apply: Callable[..., Any], info: Any, dims: tuple[Any, ...], flat: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule of torch.vmap for every op: a call for each index, whose outputs are stacked."""
    results = []
    for i in range(info.batch_size):
        own = [each.select(dim, i) if isinstance(dim, int) else each for each, dim in zip(flat, dims, strict=True)]
        results.append(apply(*own))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether nothing looks on: no compiler, tracer, mode or transform, and no tensor without data or of another
    class."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE) and _have_data(tensors)


def _have_data(tensors: list[Tensor]) -> bool:
    """Whether a backend can take these tensors: they have data, no class of their own, and no dispatch mode watches."""
    if torch._C._len_torch_dispatch_stack():
        return False
    return all([type(tensor) in _PLAIN and not tensor.is_meta for tensor in tensors])
