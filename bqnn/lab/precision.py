"""autocast: in which dtype the networks of a recipe compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from bqnn.lab.recipe import Recipe


def autocast(recipe: Recipe, device: torch.device | str) -> AbstractContextManager[object]:
    """A context for forward passes of a recipe's networks: torch's autocast to ``recipe.autocast``, "none" for none.

    Products and convolutions then take bfloat16 and give it. Float32 are the weights and their gradients, posteriors
    and codebooks, the optimizer's state, and the statistics that BatchNorm keeps; so is the loss, which training makes
    outside of the context, of logits in float32. A device that has no bfloat16 computes in float32.
    """
    kind = torch.device(device).type
    has_bfloat16 = kind == "cpu" or (torch.amp.is_autocast_available(kind) and _accelerator_has_bfloat16(kind))
    if recipe.autocast == "none" or not has_bfloat16:
        return nullcontext()
    return torch.autocast(kind, dtype=torch.bfloat16)


def _accelerator_has_bfloat16(kind: str) -> bool:
    return kind != "cuda" or torch.cuda.is_bf16_supported()
