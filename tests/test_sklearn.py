"""The estimators of scikit-learn: clones, pipelines, searches, and what they predict."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import bqnn
from bqnn.sklearn import BayesClassifier, BayesRegressor

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(240, 5)) * [1.0, 10.0, 0.1, 1.0, 1.0] + [0.0, 3.0, 0.0, 0.0, -2.0]
NAMES = np.array(["left", "middle", "right"])
Y = NAMES[np.digitize(X[:, 0], [-0.5, 0.5])]
SMALL: dict[str, Any] = {"hidden": (16,), "batch_size": 32, "random_state": 0}


def test_a_classifier_in_a_pipeline() -> None:
    model = make_pipeline(StandardScaler(), BayesClassifier(**SMALL | {"hidden": (64,)}, epochs=150))
    assert cross_val_score(model, X, Y, cv=2).mean() > 0.8
    model.fit(X, Y)
    probs, classes = model.predict_proba(X), model[-1].classes_
    assert classes.tolist() == sorted(NAMES) and probs.shape == (240, 3)
    np.testing.assert_allclose(probs.sum(1), 1.0, rtol=1e-5)
    assert (model.predict(X) == classes[probs.argmax(1)]).all()
    inputs = torch.tensor(model[0].transform(X), dtype=torch.float32)
    assert np.array_equal(probs, model[-1].net_(inputs).softmax(1).detach().numpy())
    assert bqnn.pack(model[-1].net_)(inputs).shape == (240, 3)


def test_the_same_random_state_gives_the_same_numbers() -> None:
    model = BayesClassifier(**SMALL, epochs=3, samples=3)
    first, second = (clone(model).fit(X, Y).predict_proba(X) for _ in range(2))
    assert np.array_equal(first, second)
    other = clone(model).set_params(random_state=1).fit(X, Y)
    assert not np.array_equal(other.predict_proba(X), first)
    assert np.array_equal(other.predict_proba(X), other.predict_proba(X))
    assert np.array_equal(pickle.loads(pickle.dumps(other)).predict_proba(X), other.predict_proba(X))


def test_a_search_over_parameters() -> None:
    grid = {"num_levels": [2, 4], "fit_options": [{"prior": "gaussian"}]}
    search = GridSearchCV(BayesClassifier(**SMALL, epochs=3), grid, cv=2).fit(X, Y)
    layer = search.best_estimator_.net_[0]
    assert (layer.num_levels, layer.prior) == (search.best_params_["num_levels"], "gaussian")


def test_a_network_of_ones_own() -> None:
    model = BayesClassifier(make_net=lambda inputs, outputs: nn.Linear(inputs, outputs), epochs=3, random_state=0)
    assert model.fit(X, Y).net_.weight.shape == (3, 5)


@pytest.mark.parametrize("columns", [0, 2])
def test_a_regression(columns: int) -> None:
    noise = RANDOM.normal(size=240)
    y = 1000.0 + 50.0 * X[:, 0] + 5.0 * noise
    y = np.stack([y, -0.01 * X[:, 0]], 1) if columns else y
    model = make_pipeline(StandardScaler(), BayesRegressor(**SMALL, epochs=60, num_levels=8, samples=4)).fit(X, y)
    mean, deviation = model.predict(X, return_std=True)
    assert mean.shape == deviation.shape == y.shape and np.array_equal(mean, model.predict(X))
    assert model.score(X, y) > 0.9
    assert 0.5 < ((y - mean) ** 2).mean() ** 0.5 / (deviation**2).mean() ** 0.5 < 2.0


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(NotFittedError):
        BayesClassifier().predict(X)
    with pytest.raises(ValueError, match="y must have two classes or more, got one class"):
        BayesClassifier().fit(X, np.zeros(240))
    with pytest.raises(ValueError, match="epochs must be from 1 to"):
        BayesClassifier(epochs=0).fit(X, Y)
    with pytest.raises(ValueError, match="NaN"):
        BayesRegressor().fit(X * np.nan, X[:, 0])
    with pytest.raises(ValueError, match="Unknown label type"):
        BayesClassifier().fit(X, X[:, 0])
    model = BayesRegressor(**SMALL, epochs=1).fit(X, X[:, 0])
    with pytest.raises(ValueError, match="X must have the 5 features of fit, got 4"):
        model.predict(X[:, :4])
