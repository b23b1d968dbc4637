"""Declares an op: its schema, fake and autograd, and the way from the dispatcher to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bqnn import dispatch


def register_op(
    name: str,
    signature: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Declares ``bqnn::name`` with ``signature``, e.g. ``(Tensor x, str? backend=None) -> Tensor``.

    ``reference`` takes the arguments of the signature without ``backend``, which every signature ends with, and is
    registered as the backend "reference". The first tensor argument's device chooses the backend. ``setup_context``
    and ``backward`` are those of :func:`torch.library.register_autograd`; an op without them has no gradient, and
    says so when one is asked for.
    """
    qualified = f"bqnn::{name}"

    def no_backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no gradient")

    def run(*args: Any) -> Any:
        filled = (*args, *defaults[len(args) :])
        return dispatch.implementation(name, args[0].device, filled[-1])(*filled[:-1])

    torch.library.define(qualified, signature)
    # The dispatcher leaves out trailing arguments that have their default value.
    defaults = [argument.default_value for argument in getattr(torch.ops.bqnn, name).default._schema.arguments]
    dispatch.register(name, "reference", reference)
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward or no_backward, setup_context=setup_context)
