"""The ops: one module each, with its schema, fake, gradient, reference and public function."""

from bqnn.ops.assign_codes import assign_codes
from bqnn.ops.flops import start_counting
from bqnn.ops.mixture_kl import mixture_kl
from bqnn.ops.moment_conv2d import moment_conv2d
from bqnn.ops.moment_linear import moment_linear
from bqnn.ops.packed_conv2d import packed_conv2d
from bqnn.ops.packed_linear import packed_linear
from bqnn.ops.sample_conv2d import sample_conv2d
from bqnn.ops.sample_linear import sample_linear
from bqnn.ops.spike_slab_kl import spike_slab_kl

start_counting()

__all__ = [
    "assign_codes",
    "mixture_kl",
    "moment_conv2d",
    "moment_linear",
    "packed_conv2d",
    "packed_linear",
    "sample_conv2d",
    "sample_linear",
    "spike_slab_kl",
]
