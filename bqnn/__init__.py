"""bqnn: Bayesian asymmetric M-ary quantized neural networks, trained, packed and run (Chien and Chang 2023)."""

from bqnn._version import __version__
from bqnn.bayes.batchnorm import refresh_batchnorm
from bqnn.bayes.convert import convert, convert_
from bqnn.bayes.convolutions import BayesConv1d, BayesConv2d
from bqnn.bayes.elbo import Elbo, elbo, kl_divergence, kl_warmup, parameter_groups
from bqnn.bayes.embedding import BayesEmbedding
from bqnn.bayes.layers import BayesLinear, sampling
from bqnn.bayes.likelihood import GaussianLikelihood
from bqnn.bayes.predict import Prediction, RegressionPrediction, predict
from bqnn.bayes.sample import sample
from bqnn.core.ensemble import Ensemble
from bqnn.core.files import FormatError
from bqnn.core.native import cpu_isa
from bqnn.core.philox import capturable
from bqnn.engine.compile import compile
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.dequantize import dequantize
from bqnn.engine.ensemble import CompiledEnsemble
from bqnn.engine.export_onnx import export_onnx
from bqnn.engine.pack import pack, pack_
from bqnn.files.metadata import Metadata
from bqnn.files.network import info, load, save
from bqnn.ops.dispatch import BackendError, backends
from bqnn.packed.convolutions import PackedConv1d, PackedConv2d
from bqnn.packed.embedding import PackedEmbedding
from bqnn.packed.layers import PackedLinear
from bqnn.reports.explain import explain_speed
from bqnn.reports.report import Report, report
from bqnn.training.fit import FitResult, fit
from bqnn.view.network import write_report

__all__ = [
    "BackendError",
    "BayesConv1d",
    "BayesConv2d",
    "BayesEmbedding",
    "BayesLinear",
    "CompiledEnsemble",
    "CompiledNetwork",
    "Elbo",
    "Ensemble",
    "FitResult",
    "FormatError",
    "GaussianLikelihood",
    "Metadata",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "Prediction",
    "RegressionPrediction",
    "Report",
    "__version__",
    "backends",
    "capturable",
    "compile",
    "convert",
    "convert_",
    "cpu_isa",
    "dequantize",
    "elbo",
    "explain_speed",
    "export_onnx",
    "fit",
    "info",
    "kl_divergence",
    "kl_warmup",
    "load",
    "pack",
    "pack_",
    "parameter_groups",
    "predict",
    "refresh_batchnorm",
    "report",
    "sample",
    "sampling",
    "save",
    "write_report",
]
