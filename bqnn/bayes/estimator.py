"""How the likelihood sees the weight of a Bayes layer: its estimator, and whether it is drawn outside training too."""

from __future__ import annotations

from contextvars import ContextVar

from bqnn.bayes.weight import PosteriorWeight
from bqnn.core.check import check_choice

ESTIMATORS = ("moment", "sample", "local", "deterministic")

sampled_layers: ContextVar[frozenset[EstimatedWeight]] = ContextVar("sampled_layers", default=frozenset())


class EstimatedWeight(PosteriorWeight):
    """A posterior with an estimator."""

    _estimator = ""
    _variance_learns = True
    _replica_of_sampling = False

    @property
    def estimator(self) -> str:
        """ "moment", "sample", "local" or "deterministic"; may be set, whatever optimizers there are already.

        A deterministic layer has no use for ``log_sigma2``, which then requires no gradient: DistributedDataParallel
        waits for the gradient of every parameter that requires one. Another estimator gives it back what it had. Tied
        layers have one ``log_sigma2``, which is of no use where all of them are deterministic.

        Raises:
            ValueError: set to none of those.
        """
        return self._estimator

    @estimator.setter
    def estimator(self, value: str) -> None:
        check_choice("estimator", value, ESTIMATORS)
        before = self._has_idle_variance()
        self._estimator = value
        after = self._has_idle_variance()
        if after and not before:
            for layer in self.sharing_layers():
                layer._variance_learns = self.log_sigma2.requires_grad
            self.log_sigma2.requires_grad_(False).grad = None
        elif before and not after:
            self.log_sigma2.requires_grad_(self._variance_learns)

    @property
    def variance_learns(self) -> bool:
        """Whether ``log_sigma2`` requires a gradient, or would with an estimator that has a use for it."""
        return self._variance_learns if self._has_idle_variance() else self.log_sigma2.requires_grad

    def _has_idle_variance(self) -> bool:
        return all(layer._estimator == "deterministic" for layer in self.sharing_layers())

    def freeze_weight(self, requires_grad: bool) -> None:
        super().freeze_weight(requires_grad)
        for layer in self.sharing_layers():
            layer._variance_learns = requires_grad
        if self._has_idle_variance():
            self.log_sigma2.requires_grad_(False)

    @property
    def sampling(self) -> bool:
        """Whether the layer is inside :func:`bqnn.sampling`, in this thread (or task)."""
        return self in sampled_layers.get() or self._replica_of_sampling

    def _replicate_for_data_parallel(self) -> EstimatedWeight:
        """A replica runs in a thread of its own, where nobody has entered :func:`bqnn.sampling`."""
        replica = super()._replicate_for_data_parallel()
        replica._replica_of_sampling = self.sampling
        return replica
