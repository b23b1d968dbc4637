"""BayesLinear, nn.Linear with an M-ary quantized weight that is a distribution; and what is done with all Bayes layers
of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from bqnn import ops
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.estimator import sampled_layers
from bqnn.bayes.options import BayesOptions
from bqnn.core.check import check_linear_input, check_module
from bqnn.core.leaf import node_of

if TYPE_CHECKING:  # of Python itself from 3.11 on
    from typing_extensions import Unpack


class BayesLinear(BayesLayer, nn.Linear):  # type: ignore[override]
    """nn.Linear whose weight is N(mu, sigma^2), quantized to M learned levels (Chien and Chang 2023).

    In training mode the forward pass is the estimator's; in evaluation mode it is the product with Q(mu), and inside
    :func:`bqnn.sampling` the estimator's again.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear takes them.
        num_levels: M, 2 to 16; 3 where it is not given, as of choices below the first.
        granularity: "tensor", one codebook, or "channel", one for each output feature.
        partition: "nearest", thresholds half-way between levels, or "learned".
        estimator: "moment", "sample", "local" or "deterministic"; how the likelihood sees the weight in training.
        prior: "spike_slab", "gaussian" or "mixture", of Gaussian spikes and a Gaussian slab; see
            :func:`bqnn.ops.mixture_kl`, and :meth:`bound_means_`, which is for after each step of its optimizer.
        quantize_mean: for "local", False by default: the mean path sees Q(mu), straight-through, instead of mu.
        coarse_variance: for "moment" and "local", True by default: the variances of the outputs are rounded to
            bfloat16, which changes the noise by a thousandth of itself and saves time and memory; see
            :func:`bqnn.ops.moment_linear`.
        spike_width, slab_share: of the prior "mixture": the deviation of its spikes in narrowest gaps, 0.001 to 1000,
            and the share of its slab, 1e-6 to 1 - 1e-6.
        start_sigma: the posterior deviation at the start, in narrowest gaps, 0.001 to 10.
            Defaults are :data:`bqnn.bayes.options.SPIKE_WIDTH`, ``SLAB_SHARE`` and ``SIGMA_PER_GAP``.

    Raises:
        TypeError, ValueError: an argument out of its range; a wrong x in the forward pass.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[BayesOptions],
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_bayes(**options)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        check_linear_input(x, self.in_features)
        if self.training or self.sampling:
            return self._product(x, ops.sample_linear, ops.moment_linear, {})
        return F.linear(x, *self._evaluation_parameters(x))


def bayes_layers(net: nn.Module) -> dict[str, BayesLayer]:
    """Every Bayes layer of a network by its name, a shared one once.

    Raises:
        TypeError: ``net`` is no module.
    """
    check_module("net", net)
    return {name: module for name, module in net.named_modules() if isinstance(module, BayesLayer)}


def bound_means_(layers: Iterable[BayesLayer]) -> None:
    """Bounds the means of those layers that need it: the ones with a posterior under the prior "mixture" that
    are not frozen."""
    for layer in layers:
        if layer.prior == "mixture" and layer.estimator != "deterministic" and layer.mean.requires_grad:
            layer.bound_means_()


@contextmanager
def sampling(net: nn.Module) -> Iterator[None]:
    """Inside, the Bayes layers of ``net`` draw from the posterior in evaluation mode too.

    That holds for the thread (or asyncio task) that is inside, and for no other one that runs the same network.
    """
    token = sampled_layers.set(sampled_layers.get().union(bayes_layers(net).values()))
    try:
        yield
    finally:
        sampled_layers.reset(token)
