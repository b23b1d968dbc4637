"""A classifier for tables, as an estimator of scikit-learn: in a pipeline, in a search, and packed in the end.

python examples/scikit_learn.py      # some seconds; needs the extra: pip install 'bqnn[sklearn]'
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bqnn
from bqnn.sklearn import BayesClassifier


def main(epochs: int = 40) -> dict[str, float]:
    x, y = load_breast_cancer(return_X_y=True)
    x, held_out, y, classes = train_test_split(x, y, test_size=0.3, random_state=0)
    classifier = BayesClassifier(hidden=(64,), epochs=epochs, batch_size=32, samples=8, random_state=0)
    pipeline = make_pipeline(StandardScaler(), classifier)
    search = GridSearchCV(pipeline, {"bayesclassifier__num_levels": [2, 4]}, cv=2).fit(x, y)

    scores = search.cv_results_["mean_test_score"]
    for settings, score in zip(search.cv_results_["params"], scores):
        print(f"{settings['bayesclassifier__num_levels']} levels: {100 * score:.1f} % right in cross-validation")
    right = search.score(held_out, classes)
    scaler, best = search.best_estimator_
    small = bqnn.pack(best.net_)
    found = small(torch.tensor(scaler.transform(held_out), dtype=torch.float32)).argmax(1).numpy()
    packed = (best.classes_[found] == classes).mean()
    print(f"right on held-out rows {100 * right:.1f} %, packed {100 * packed:.1f} %")
    return {"right": right, "packed": packed}


if __name__ == "__main__":
    main()
