"""Estimators of scikit-learn on top of bqnn.fit: for tables, pipelines and searches over parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bqnn.bayes.predict import predict
from bqnn.core.extras import needs
from bqnn.training.fit import fit

with needs("sklearn"):
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_random_state, check_X_y
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted

SEEDS = 2**31  # what a RandomState of NumPy draws from on every platform


class _BayesEstimator(BaseEstimator):
    """What both estimators share: their parameters, and the network."""

    def __init__(
        self,
        hidden: Sequence[int] = (256,),
        *,
        make_net: Callable[[int, int], nn.Module] | None = None,
        epochs: int | Sequence[int] = 20,
        batch_size: int = 128,
        num_levels: int = 3,
        samples: int = 1,
        device: str | None = None,
        random_state: Any = None,
        fit_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.hidden, self.make_net, self.epochs, self.batch_size = hidden, make_net, epochs, batch_size
        self.num_levels, self.samples, self.device = num_levels, samples, device
        self.random_state, self.fit_options = random_state, fit_options

    def _fit_net(self, x: Any, target: Tensor, outputs: int, task: str) -> Any:
        self.n_features_in_ = x.shape[1]
        self.seed_ = int(check_random_state(self.random_state).randint(SEEDS))
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed_)
            net = (self.make_net or self._mlp)(self.n_features_in_, outputs)
        loader = DataLoader(TensorDataset(torch.from_numpy(x), target), self.batch_size, shuffle=True)
        options = {"epochs": self.epochs, "num_levels": self.num_levels, "device": self.device, "seed": self.seed_}
        result = fit(net, loader, task=task, **{**options, **(self.fit_options or {})})
        self.net_, self.history_ = result.net, result.history
        return result

    def _mlp(self, inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in self.hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def _inputs(self, x: Any) -> Tensor:
        check_is_fitted(self, "net_")
        x = check_array(x, dtype=np.float32)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"X must have the {self.n_features_in_} features of fit, got {x.shape[1]}")
        return torch.from_numpy(x).to(next(self.net_.parameters()).device)


class BayesClassifier(ClassifierMixin, _BayesEstimator):
    """A classifier of scikit-learn: a Bayes network, by default a perceptron, trained by :func:`bqnn.fit`.

    Features are taken as they are: put a StandardScaler before it. Small tables have few steps an epoch:
    give them more epochs.

    Args:
        hidden: widths of the layers of the perceptron between inputs and outputs.
        make_net: another network, as a function of the numbers of features and of classes.
        epochs, num_levels, device: as :func:`bqnn.fit` takes them.
        batch_size: rows of a step of training.
        samples: networks that are drawn from the posterior for a prediction; 1 is the quantized network itself.
        random_state: of weights, order, noise and draws, as scikit-learn takes it.
        fit_options: further arguments of :func:`bqnn.fit`.

    Attributes:
        net_: the Bayes network, for :func:`bqnn.pack`. classes_, n_features_in_: as of any classifier.
        history_: the records of training.

    Raises:
        ValueError: of ``fit``: a y of one class, or what bqnn.fit raises; of ``predict``: another number of features.
    """

    def fit(self, X: Any, y: Any) -> BayesClassifier:
        """Trains on X [rows, features] and classes y [rows], numbers or strings; itself."""
        x, y = check_X_y(X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have two classes or more, got one class, {self.classes_[0]!r}")
        self._fit_net(x, torch.from_numpy(codes), len(self.classes_), "classification")
        return self

    def predict_proba(self, X: Any) -> Any:
        """Probabilities float32 [rows, classes], in the order of ``classes_``."""
        inputs = self._inputs(X)
        return predict(self.net_, inputs, self.samples, seed=self.seed_).probs.cpu().numpy()

    def predict(self, X: Any) -> Any:
        """The most probable class of each row."""
        codes = self.predict_proba(X).argmax(1)
        return self.classes_[codes]


class BayesRegressor(RegressorMixin, _BayesEstimator):
    """A regression of scikit-learn: a Bayes network, by default a perceptron, trained by :func:`bqnn.fit`.

    Targets are standardised for the training; features are taken as they are.

    Args:
        hidden ... fit_options: as :class:`BayesClassifier` takes them.

    Attributes:
        net_: the Bayes network, of standardised targets; n_features_in_, history_: as of :class:`BayesClassifier`.
    """

    def fit(self, X: Any, y: Any) -> BayesRegressor:
        """Trains on X [rows, features] and y [rows] or [rows, outputs]; itself."""
        x, y = check_X_y(X, y, dtype=np.float32, multi_output=True, y_numeric=True)
        self.is_column_ = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        self.mean_, scale = y.mean(0), y.std(0)
        self.scale_ = np.where(scale > 0.0, scale, 1.0)
        target = torch.from_numpy(((y - self.mean_) / self.scale_).astype(np.float32))
        self.noise_variance_ = self._fit_net(x, target, y.shape[1], "regression").noise_variance
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The mean, float64 in the shape of y; with ``return_std`` also the deviation, of weights and noise."""
        inputs, noise = self._inputs(X), self.noise_variance_
        found = predict(self.net_, inputs, self.samples, task="regression", noise_variance=noise, seed=self.seed_)
        mean = found.mean.double().cpu().numpy() * self.scale_ + self.mean_
        deviation = found.deviation.double().cpu().numpy() * self.scale_
        if self.is_column_:
            mean, deviation = mean[:, 0], deviation[:, 0]
        return (mean, deviation) if return_std else mean
