"""bqnn: Bayesian asymmetric M-ary quantized neural networks, trained, packed and run (Chien and Chang 2023)."""

from bqnn._version import __version__
from bqnn.dispatch import BackendError, backends
from bqnn.batchnorm import refresh_batchnorm
from bqnn.convert import convert, convert_
from bqnn.elbo import Elbo, elbo, kl_divergence, kl_warmup, parameter_groups
from bqnn.layers import BayesConv2d, BayesLinear, sampling
from bqnn.predict import Prediction, predict

__all__ = [
    "BackendError",
    "BayesConv2d",
    "BayesLinear",
    "Elbo",
    "Prediction",
    "__version__",
    "backends",
    "convert",
    "convert_",
    "elbo",
    "kl_divergence",
    "kl_warmup",
    "parameter_groups",
    "predict",
    "refresh_batchnorm",
    "sampling",
]
