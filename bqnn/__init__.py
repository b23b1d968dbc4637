"""bqnn: Bayesian asymmetric M-ary quantized neural networks, trained, packed and run (Chien and Chang 2023)."""

from bqnn._version import __version__
from bqnn.autotune import Tuning, autotune, load_configs
from bqnn.batchnorm import refresh_batchnorm
from bqnn.convert import convert, convert_
from bqnn.dispatch import BackendError, backends
from bqnn.elbo import Elbo, elbo, kl_divergence, kl_warmup, parameter_groups
from bqnn.extension import cpu_isa
from bqnn.io import FormatError, info, load, save
from bqnn.layers import BayesConv2d, BayesLinear, sampling
from bqnn.pack import pack
from bqnn.packed import PackedConv2d, PackedLinear
from bqnn.predict import Prediction, predict
from bqnn.report import Report, report
from bqnn.speed import explain_speed

__all__ = [
    "BackendError",
    "BayesConv2d",
    "BayesLinear",
    "Elbo",
    "FormatError",
    "PackedConv2d",
    "PackedLinear",
    "Prediction",
    "Report",
    "Tuning",
    "__version__",
    "autotune",
    "backends",
    "convert",
    "convert_",
    "cpu_isa",
    "elbo",
    "explain_speed",
    "info",
    "kl_divergence",
    "kl_warmup",
    "load",
    "load_configs",
    "pack",
    "parameter_groups",
    "predict",
    "refresh_batchnorm",
    "report",
    "sampling",
    "save",
]
