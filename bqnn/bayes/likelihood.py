"""Likelihoods of classification and regression: what `elbo` takes as ``nll``, and how good a network is by them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import check_choice, check_tensor
from bqnn.core.precision import wide

TASKS = ("classification", "regression")
MEMORY = 0.95  # of the noise variance, a step: it follows the residuals of some twenty batches
# Of the variance of a batch's targets: a network that fits a batch exactly would make the likelihood infinite.
LEAST_NOISE = 1e-6


class Likelihood:
    """What a task makes of outputs and targets: the loss of training, and the figures of validation."""

    measure: str
    """The name of the figure that :meth:`summarize` gives."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean negative log likelihood of a batch of training, in nats a sample."""
        raise NotImplementedError

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """The same of any batch, from which nothing is learned."""
        raise NotImplementedError

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """float32 or float64: 0 or 1, or a squared residual, of each value."""
        raise NotImplementedError

    def average(self, losses: Tensor) -> Tensor:
        """The mean of losses of a batch; of a regression with several outputs, of each."""
        return losses.mean()

    def summarize(self, mean: Tensor) -> float:
        """The figure that belongs to :meth:`average`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What it has learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""


class CategoricalLikelihood(Likelihood):
    """Of logits [B, classes, ...] and classes, integers [B, ...], or probabilities, floating point [B, classes, ...].

    Where a sample has several places, such as the pixels of a segmentation, its likelihood is the product over them.

    Raises:
        TypeError, ValueError: the network's output or the target has another type or shape.
    """

    measure = "error"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.nll(output, target)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output, target)
        target = target if target.is_floating_point() else target.long()
        if output.dim() == 2:
            return F.cross_entropy(output, target)
        return F.cross_entropy(output, target, reduction="sum") / max(1, len(output))

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output, target)
        classes = target.argmax(1) if target.is_floating_point() else target
        return (output.argmax(1) != classes).float()

    def summarize(self, mean: Tensor) -> float:
        return 100.0 * mean.mean().item()

    def _check(self, output: Tensor, target: Tensor) -> None:
        check_tensor("the network's output", output)
        check_tensor("target", target)
        if output.dim() < 2 or output.shape[1] < 2:
            raise ValueError(
                "the network's output must be logits [batch, classes] of two classes or more, "
                f'got the shape {list(output.shape)}; task="regression" is for other numbers'
            )
        expected = output.shape if target.is_floating_point() else output.shape[:1] + output.shape[2:]
        if target.shape != expected:
            kind = "probabilities" if target.is_floating_point() else "classes"
            raise ValueError(f"target must be {kind} of the shape {list(expected)}, got {list(target.shape)}")


class GaussianLikelihood(Likelihood):
    """Of outputs and targets that differ by Gaussian noise, whose variance is estimated while a network trains.

    ``bqnn.elbo(net(x), y, net, size, nll=likelihood)`` with one such object for the whole training. The variance that
    maximizes the likelihood of some residuals is their mean square (Rybkin et al., "Simple and effective VAE training
    with calibrated decoders", 2021, eq. 5); here it is a running mean over batches, which follows the residuals of
    training, with the noise of its weights. It is at least a millionth of the variance of a batch's targets.

    Outputs and targets are of one shape [B, ...], but for a last dimension of 1 that either may leave out.

    Attributes:
        variance: float32 or float64, of the targets' squared unit; [D] for outputs [B, D], else a scalar; None before
            the first batch.

    Raises:
        TypeError, ValueError: output and target do not go together, or :meth:`nll` before the first batch.
    """

    measure = "rmse"

    def __init__(self) -> None:
        self.variance: Tensor | None = None
        # Of the batches so far in the running mean, which would else be averaged with a beginning of zero.
        self._weight = 0.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self._update(self.losses(output.detach(), target), wide(target.detach()))
        return self.nll(output, target)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        if self.variance is None:
            raise ValueError("the likelihood must have seen a batch of training before, got none")
        squares = self.losses(output, target)
        each = 0.5 * (squares / self.variance + (2.0 * math.pi * self.variance).log())
        return each.sum() / max(1, len(squares))

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        check_tensor("the network's output", output)
        check_tensor("target", target)
        output = wide(output)
        if output.dim() == target.dim() + 1 and output.shape[-1] == 1:
            output = output.squeeze(-1)
        elif target.dim() == output.dim() + 1 and target.shape[-1] == 1:
            target = target.squeeze(-1)
        if output.shape != target.shape or not output.dim():
            raise ValueError(
                f"target must have the shape of the network's output {list(output.shape)}, got {list(target.shape)}"
            )
        return (output - target.to(output)).square()

    def summarize(self, mean: Tensor) -> float:
        return mean.mean().sqrt().item()

    def average(self, losses: Tensor) -> Tensor:
        return losses.mean(0) if losses.dim() == 2 else losses.mean()

    def state_dict(self) -> dict[str, Any]:
        return {"variance": self.variance, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.variance, self._weight = state["variance"], state["weight"]

    def _update(self, squares: Tensor, target: Tensor) -> None:
        if not squares.numel():
            return
        spread = target.to(squares).var(correction=0)
        found = self.average(squares)
        floor = LEAST_NOISE * spread + torch.finfo(squares.dtype).eps ** 2
        before = torch.zeros_like(found) if self.variance is None else self.variance * self._weight
        weight = MEMORY * self._weight + (1.0 - MEMORY)
        self.variance = ((MEMORY * before + (1.0 - MEMORY) * found) / weight).maximum(floor)
        self._weight = weight


def likelihood_of(task: str) -> Likelihood:
    """A new likelihood for a task of :data:`TASKS`; ValueError for another one."""
    check_choice("task", task, TASKS)
    return CategoricalLikelihood() if task == "classification" else GaussianLikelihood()
