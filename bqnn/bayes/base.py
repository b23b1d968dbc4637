"""What the Bayes layers share: the posterior, the codebook, the estimator and the divergence from the prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bqnn import ops
from bqnn.bayes.drawn import DrawnWeight
from bqnn.bayes.options import DEFAULTS, SIGMA_PER_GAP, BayesOptions, completed
from bqnn.core import codebook, quantizer
from bqnn.core.check import check_floating
from bqnn.core.philox import Noise, fresh_seed
from bqnn.core.precision import is_autocasting, wide, wide_dtype
from bqnn.core.quantizer import Posterior
from bqnn.core.sharded import local, put_, rows_of, total, whole
from bqnn.ops.codebook_from_raw import codebook_from_raw

if TYPE_CHECKING:  # of Python itself from 3.11 on
    from typing_extensions import Unpack

LOG_SIGMA2_RANGE = (-40.0, 10.0)  # of a layer with weights of an ordinary size
LOG_SIGMA2_REACH = (-30.0, 15.0)  # of any layer: from where the variances of its codebook would start


class BayesLayer(DrawnWeight):
    """What the layers share: the posterior, the codebook, the estimator and the divergence from the prior.

    Parameters of the module: the means, which are called "weight" in state dicts and by ``named_parameters``, as those
    of nn.Linear are, ``log_sigma2`` (the weight's shape), ``bias``, ``raw_levels`` [G, M] and, for
    ``partition="learned"``, ``raw_thresholds`` [G, M - 1]. ``levels`` and ``thresholds`` are made of the raw ones, in
    order by construction. The scale of the levels and the variance of the Gaussian prior are buffers, float32 at least:
    ``half()`` and ``bfloat16()`` leave them alone, as float16 ends at 6e-8. With them, parameters of half precision
    stand for a codebook of any size; levels, thresholds and divergences are computed in float32.
    """

    bias: Any  # nn.Parameter or None, as nn.Linear and nn.Conv2d declare it
    num_levels: int
    granularity: str
    partition: str
    prior: str
    quantize_mean: bool
    coarse_variance: bool
    spike_width: float
    slab_share: float
    start_sigma: float
    raw_thresholds: nn.Parameter | None
    level_scale: Tensor
    prior_sigma2: Tensor
    asked_for_kl = False
    """Whether somebody has called :meth:`kl_divergence`, as who maximizes the evidence lower bound does."""

    def _init_bayes(self, **options: Unpack[BayesOptions]) -> None:
        values = completed(options)
        for name, value in values.items():
            if name != "estimator":  # which decides about the variances
                setattr(self, name, value)
        num_levels, groups = self.num_levels, 1 if self.granularity == "tensor" else self.mean.shape[0]
        empty, wide_type = self.mean.detach().new_empty, wide_dtype(self.mean.dtype)
        self.log_sigma2 = nn.Parameter(torch.empty_like(self.mean))
        self.estimator = values["estimator"]
        self.raw_levels = nn.Parameter(empty((groups, num_levels)))
        raw_thresholds = nn.Parameter(empty((groups, num_levels - 1))) if self.partition == "learned" else None
        self.register_parameter("raw_thresholds", raw_thresholds)
        self.register_buffer("level_scale", empty((groups, 1), dtype=wide_type))
        self.register_buffer("prior_sigma2", empty((), dtype=wide_type))
        if self.mean.device.type != "meta":
            self.fit_codebook_()

    @property
    def levels(self) -> Tensor:
        """c_0 < ... < c_{M-1} of each codebook: [1 or out channels, M], in the weight's dtype."""
        return self._codebook()[0].to(self.mean.dtype)

    @property
    def thresholds(self) -> Tensor:
        """t_1 < ... < t_{M-1} of each codebook: [1 or out channels, M - 1], in the weight's dtype."""
        return self._codebook()[1].to(self.mean.dtype)

    def codebook(self) -> tuple[Tensor, Tensor]:
        return self._codebook()[:2]

    def _codebook(self, partial: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, thresholds, and the widths of the prior's windows, float32 at least: what the layer computes with;
        ``partial`` is as for :func:`bqnn.core.sharded.whole`."""
        raw_levels, raw_thresholds = whole(self.raw_levels, partial), whole(self.raw_thresholds, partial)
        return codebook_from_raw(raw_levels, self.level_scale, raw_thresholds)

    @torch.no_grad()
    def fit_codebook_(self) -> None:
        """Fits the levels to the weights, thresholds half-way between them, and starts the variances from the gaps.

        The levels are the ones with the least squared error, whatever the size of the weights is and however many of
        them are the same; see :func:`bqnn.core.codebook.lloyd_max`. Where a codebook has one value only, its other
        levels are spaced for the deviation of the layer's weights, and in a layer of one value, such as one that starts
        at zero, for the deviation sqrt(2 / inputs of an output) that weights can be expected to train to.

        Raises:
            ValueError: a weight is NaN or infinite, or there is none.
        """
        mean = whole(self.mean)
        if mean.numel() == 0:
            raise ValueError(f"weight must have elements, got the shape {list(mean.shape)}")
        if not torch.isfinite(mean).all():
            raise ValueError("weight must be finite, got NaN or infinity")
        size = torch.linalg.vector_norm(mean, dtype=torch.float64).item()
        mean_square = size * size / mean.numel()
        if self._is_constant():
            mean_square += self._expected_spread() ** 2
        limits = torch.finfo(self.prior_sigma2.dtype)
        self.prior_sigma2.fill_(min(max(mean_square, limits.smallest_normal * limits.eps), limits.max))
        rows = wide(mean).reshape(self.raw_levels.shape[0], -1)
        self.set_levels_(codebook.lloyd_max(rows, self.num_levels, self._expected_spread()))

    @torch.no_grad()
    def set_levels_(self, levels: Tensor, thresholds: Tensor | None = None) -> None:
        """Sets the codebook; variances start again from its gaps.

        Args:
            levels: [1 or out channels, M], strictly increasing in each row.
            thresholds: [1 or out channels, M - 1], each between its two levels; half-way without. Only for
                ``partition="learned"``.

        Raises:
            TypeError, ValueError: the wrong dtype or shape, or an order that is not strict.
        """
        check_floating("levels", levels)
        if levels.shape != self.raw_levels.shape:
            raise ValueError(f"levels must have the shape {list(self.raw_levels.shape)}, got {list(levels.shape)}")
        levels = levels.to(self.level_scale)
        exact = levels.double()
        scale = exact.std(1, correction=0, keepdim=True).to(levels)
        steps = levels[:, 1:] - levels[:, :-1]
        if not (torch.isfinite(levels).all() and (steps > codebook.smallest_gap(levels[:, :1], scale)).all()):
            raise ValueError(
                "levels must be finite and strictly increasing in each row, by more than "
                f"{codebook.MIN_GAP:g} of their size, got {levels.tolist()}"
            )
        raw_thresholds = None if thresholds is None else self._raw_thresholds_of(levels, thresholds)
        self.level_scale.copy_(scale)
        put_(self.raw_levels, codebook.raw_from_levels(exact, scale.double()))
        if self.raw_thresholds is not None:
            put_(self.raw_thresholds, torch.zeros_like(steps) if raw_thresholds is None else raw_thresholds)
        self.reset_variances_()

    @torch.no_grad()
    def reset_variances_(self) -> None:
        """Starts the posterior deviations again, at ``start_sigma`` times the narrowest gap between two levels.

        Where all weights are the same, as in a layer that starts at zero, they say nothing of the size that they will
        have, and the deviation is that of the levels: so the likelihood sees them all from the first step on. At a
        tenth of a gap from the middle of a cell it would see one. On the meta device there are no numbers to set.
        """
        if self.mean.is_meta:
            return
        narrowest = codebook.gaps(self._codebook()[0].double()).amin(1, keepdim=True)
        sigma = self.level_scale.double() if self._is_constant() else self.start_sigma * narrowest
        log_sigma2 = (2.0 * sigma.log()).view(-1, *[1] * (self.mean.dim() - 1))
        put_(self.log_sigma2, log_sigma2.expand(self.log_sigma2.shape))

    def _is_constant(self) -> bool:
        """Whether all weights are the same, as far as a codebook can tell numbers apart."""
        low, high = (end.double() for end in whole(self.mean).aminmax())
        return bool(high - low <= codebook.smallest_gap(low, 0.5 * (high - low)))

    def _expected_spread(self) -> float:
        """The standard deviation of the layer's weights; where they are all the same, the one to expect after training.

        That is the one which keeps the size of activations through a ReLU (He et al. 2015, eq. 10).
        """
        weights, rows = self.mean.numel(), self.mean.shape[0]
        if self._is_constant():
            return (2.0 * rows / weights) ** 0.5
        mean = whole(self.mean)
        centred = mean - mean.mean(dtype=torch.float64)
        return torch.linalg.vector_norm(centred, dtype=torch.float64).item() / weights**0.5

    def _raw_thresholds_of(self, levels: Tensor, thresholds: Tensor) -> Tensor:
        if self.raw_thresholds is None:
            raise ValueError('thresholds can be set only with partition="learned", got partition="nearest"')
        if thresholds.shape != self.raw_thresholds.shape:
            raise ValueError(
                f"thresholds must have the shape {list(self.raw_thresholds.shape)}, got {list(thresholds.shape)}"
            )
        raw = codebook.raw_from_thresholds(thresholds.to(levels), levels)
        if not torch.isfinite(raw).all():
            raise ValueError(
                f"thresholds must lie between neighbouring levels, {codebook.MARGIN:g} of the gap away from both, "
                f"got {thresholds.tolist()}"
            )
        return raw

    def codes(self) -> Tensor:
        """The code of every mean: uint8 in the weight's shape.

        Raises:
            ValueError: a parameter is NaN, infinite or out of range.
        """
        self.check_parameters()
        return ops.assign_codes(whole(self.mean.detach()), self._codebook()[1].detach())

    def quantized_weight(self) -> Tensor:
        """Q(mu), in the weight's shape and dtype; no gradient is recorded. Of a sampled replica, its sample."""
        if self.drawn is not None:
            return self.drawn.to(self.mean.dtype)
        with torch.no_grad():
            levels, thresholds, _ = self._codebook()
            return quantizer.look_up(levels, ops.assign_codes(self.mean, thresholds)).to(self.mean.dtype)

    def weight_value(self) -> Tensor:
        """One weight for a whole operation, distributed as the layer's own product is in the mode that it is in.

        Thresholds get no gradient from it, as with the estimator "sample".
        """
        if not (self.training or self.sampling):
            return self.quantized_weight()
        return self._one_draw(Posterior(self.mean, self.log_sigma2, *self.codebook()))

    def _one_draw(self, posterior: Posterior) -> Tensor:
        """:meth:`weight_value` while the layer trains or samples: of the whole weight, or of rows of it."""
        levels, thresholds = posterior.levels, posterior.thresholds
        mean = drawn = wide(posterior.weight)
        if self.estimator != "deterministic":
            assert posterior.log_sigma2 is not None
            drawn = mean + Noise(fresh_seed(mean.device), 0).normal(mean) * (0.5 * wide(posterior.log_sigma2)).exp()
        if self.estimator == "local" and self.training and not self.quantize_mean:
            return drawn.to(self.mean.dtype)
        partitioned = (mean if self.estimator == "local" else drawn).detach()
        codes = ops.assign_codes(partitioned, thresholds.detach())
        return (quantizer.look_up(levels, codes) + (drawn - partitioned)).to(self.mean.dtype)

    def check_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if not torch.isfinite(whole(parameter)).all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        low, high = self._log_sigma2_range()
        smallest, largest = (end.item() for end in whole(self.log_sigma2).aminmax())
        if smallest < low or largest > high:
            raise ValueError(f"log_sigma2 must be from {low} to {high}, got {smallest:g} to {largest:g}")

    def _log_sigma2_range(self) -> tuple[float, float]:
        """What log_sigma2 may be: it goes with the size of the layer's weights, whatever that is."""
        narrowest = codebook.gaps(self._codebook()[0].detach().double()).amin(1)
        low, high = (2.0 * (SIGMA_PER_GAP * end).log().item() for end in (narrowest.min(), narrowest.max()))
        return min(LOG_SIGMA2_RANGE[0], low + LOG_SIGMA2_REACH[0]), max(LOG_SIGMA2_RANGE[1], high + LOG_SIGMA2_REACH[1])

    @torch.no_grad()
    def bound_means_(self) -> None:
        """Clamps the means to the narrowest gap beyond the outermost levels of their codebook; in place.

        For after a step of the optimizer. Past the outermost levels every further mean has the same code, so that the
        likelihood says little of it, and a prior of finite spikes does not call back what a large step has carried
        away. A clamp within the forward pass would take the gradient from such a mean, and it would stay.
        """
        levels, mean = rows_of(self._codebook()[0], self.mean), local(self.mean)
        gap = levels.diff(dim=1).amin(1, keepdim=True)
        shape = (-1, *[1] * (mean.dim() - 1))
        low, high = (end.reshape(shape).to(mean.dtype) for end in (levels[:, :1] - gap, levels[:, -1:] + gap))
        mean.clamp_(low, high)

    def kl_divergence(self) -> Tensor:
        """KL(q || prior) summed over the layer's weights, a scalar in nats (spike-and-slab: up to a constant; mixture:
        a bound from above).

        In the weight's dtype, float32 for float16 and bfloat16. 0 for the deterministic estimator, which has no
        posterior. The Gaussian prior is N(0, S^2), S^2 the mean square of the weights that the codebook was fitted to,
        or the one to expect where they were all the same; it is the slab of the prior "mixture".
        """
        self.asked_for_kl = True
        mean = local(self.mean)
        if self.estimator == "deterministic":
            return wide(mean.new_zeros(()))
        return total(self._divergence_of(mean, local(self.log_sigma2)), self.mean)

    def _divergence_of(self, mean: Tensor, log_sigma2: Tensor) -> Tensor:
        """The divergence of those weights that this process has."""
        if self.prior == "gaussian":
            mean, log_sigma2, prior_sigma2 = wide(mean), wide(log_sigma2), wide(self.prior_sigma2)
            ratio = log_sigma2 - prior_sigma2.log()
            return 0.5 * (mean.square() / prior_sigma2 + ratio.exp() - ratio - 1.0).sum()
        levels, _, tau = (rows_of(each, self.mean) for each in self._codebook(partial=True))
        if self.prior == "mixture":
            mixture = self.prior_sigma2, self.spike_width, self.slab_share
            return ops.mixture_kl(mean, log_sigma2, levels, *mixture)
        return ops.spike_slab_kl(mean, log_sigma2, levels, tau)

    def _product(
        self, x: Tensor, sample: Callable[..., Tensor], moment: Callable[..., Tensor], geometry: Mapping[str, Any]
    ) -> Tensor:
        """The layer's product while it trains or samples: one op, chosen by the estimator."""
        if is_autocasting(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
            x = x.to(torch.get_autocast_dtype(x.device.type))
        levels, thresholds, _ = self._codebook()
        mean, log_sigma2 = self._operand(self.mean), self._operand(self.log_sigma2)
        if self.estimator in ("sample", "deterministic"):
            variance, seed = (log_sigma2, fresh_seed(x.device)) if self.estimator == "sample" else (None, None)
            return sample(x, mean, variance, levels, thresholds, self.bias, seed, **geometry)
        if self.estimator == "moment":
            mode = "categorical"
        else:
            # Outside training it is the quantized network whose uncertainty is asked for.
            mode = "straight_through" if self.quantize_mean or not self.training else "gaussian"
        options = {"mode": mode, "coarse_variance": self.coarse_variance}
        return moment(x, mean, log_sigma2, levels, thresholds, self.bias, fresh_seed(x.device), **options, **geometry)

    def _operand(self, weight: Tensor) -> Tensor:
        """``weight``, of the layer's shape, in the shape that the layer's op takes."""
        return weight

    def _evaluation_parameters(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Q(mu), as :meth:`_operand` shapes it, and bias in x's dtype."""
        weight = self._operand(self.quantized_weight())
        return weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also takes the state of torch's own layer: the codebook is then fitted to its weight."""
        own = ["log_sigma2", "raw_levels", "level_scale", "prior_sigma2"]
        if self.raw_thresholds is not None:
            own.append("raw_thresholds")
        plain = prefix + "weight" in state_dict and not any(prefix + name in state_dict for name in own)
        weight = state_dict.get(prefix + "weight")
        if plain and isinstance(weight, Tensor) and weight.shape == self.mean.shape:
            with torch.no_grad():
                self.mean.copy_(weight)
            self.fit_codebook_()
            state_dict = {**state_dict, **{prefix + name: getattr(self, name).detach() for name in own}}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"num_levels={self.num_levels}", f"estimator={self.estimator!r}"]
        defaults: Mapping[str, Any] = DEFAULTS
        shown = ("granularity", "partition", "prior", "spike_width", "slab_share", "start_sigma")
        values = {name: getattr(self, name) for name in shown}
        parts += [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
        return ", ".join(parts)
