"""The sampled weight Q(mu + sigma * eps) and its gradients: a block of it, for the fused products, and all of it.

A weight is a matrix [N, K] here; a convolution's is one of N rows. What products read and write of it may be in
channels-last order, where ``taps`` is the number of pixels of the kernel; it is 1 where the order is the weight's own.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.arguments import Noise, gradients_of
from bqnn.kernels.conv2d import in_channels_last, parts_of, taps_of
from bqnn.kernels.launch import blocks_of_matrix, flags_of_sample, launch, level_sums
from bqnn.kernels.philox import normals_of_rows
from bqnn.kernels.quantizer import codebook_of, partition, quantize, store_level_sums


@triton.jit
def sampled_block(posterior, noise, o_n, first, N, K, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """w = mu + sigma * eps and sigma * eps in rows o_n [BN] and the columns from ``first`` on: float32 [BN, BK].

    Without log_sigma2 both are mu.
    """
    o_k = first + tl.arange(0, BK)
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = (o_n < N)[:, None] & (o_k < K)[None, :]
    mean = tl.load(posterior.weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    if posterior.log_sigma2 is not None:
        sigma = tl.exp(0.5 * tl.load(posterior.log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32))
        shift = sigma * normals_of_rows(noise.seed, noise.offset, o_n, first, K, BK, ALIGNED)
        return mean + shift, shift
    else:
        return mean, mean


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_fwd_kernel(
    posterior,
    seed: tl.int64,
    offset: tl.int64,
    p_quantized,
    N,
    K,
    taps,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    noise = Noise(seed, offset)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    o_group = codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL)
    w, _ = sampled_block(posterior, noise, o_n, i_k * BK, N, K, BK, ALIGNED)
    quantized = quantize(w, posterior, o_group, NUM_LEVELS)
    o_q = o_n.to(tl.int64)[:, None] * K + in_channels_last(o_k, K, taps)[None, :]
    tl.store(p_quantized + o_q, quantized, mask=m_n[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_bwd_kernel(
    p_grad,
    posterior,
    seed: tl.int64,
    offset: tl.int64,
    gradients,
    N,
    K,
    taps,
    parts,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    noise = Noise(seed, offset)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_w = (o_n < N)[:, None] & (o_k < K)[None, :]
    o_p = in_channels_last(o_k, K, taps)[None, :]
    grad = tl.zeros((BN, BK), tl.float32)
    for part in range(parts):
        o_row = (part * N + o_n.to(tl.int64))[:, None] * K
        grad += tl.load(p_grad + o_row + o_p, mask=m_w, other=0.0).to(tl.float32)
    store_sample_gradients(grad, posterior, noise, gradients, o_n, i_k, N, K, NUM_LEVELS, PER_CHANNEL, ALIGNED)


@triton.jit
def store_sample_gradients(
    grad,
    posterior,
    noise,
    gradients,
    o_n,
    i_k,
    N,
    K,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """From dL/dQ of rows o_n and the i_k-th block of columns, float32 [BN, BK], 0 outside the weight: the
    straight-through gradients of mu and log_sigma2, dL/dQ and dL/dQ * sigma * eps / 2, and its sums over the cells of
    each row."""
    BK: tl.constexpr = grad.shape[1]
    p_sums = gradients.sums + i_k.to(tl.int64) * N * NUM_LEVELS
    first = i_k * BK
    w, shift = sampled_block(posterior, noise, o_n, first, N, K, BK, ALIGNED)
    m_n = o_n < N
    o_group = codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL)
    o_k = first + tl.arange(0, BK)
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = m_n[:, None] & (o_k < K)[None, :]
    tl.store(gradients.weight + o_w, grad, mask=m_w)
    if posterior.log_sigma2 is not None:
        tl.store(gradients.log_sigma2 + o_w, 0.5 * grad * shift, mask=m_w)
    store_level_sums(grad, partition(w, posterior, o_group, NUM_LEVELS), p_sums, o_n, m_n, NUM_LEVELS)


def sample(posterior, noise, dtype, memory_format=torch.contiguous_format):
    """Q(mu + sigma * eps) in ``dtype``, in the weight's shape and this memory format; the posterior is contiguous."""
    weight = posterior.weight
    quantized = torch.empty(weight.shape, device=weight.device, dtype=dtype, memory_format=memory_format)
    N, K = weight.shape[0], weight.shape[1:].numel()
    grid, blocks = blocks_of_matrix(N, K)
    launch(
        sample_fwd_kernel, grid,
        posterior, noise.seed, noise.offset, quantized, N, K, taps_of(quantized),
        **flags_of_sample(posterior), **blocks,
    )  # fmt: skip
    return quantized


def sample_backward(grad, posterior, noise):
    """The gradients of mu, log_sigma2 (empty without it) and levels, all contiguous.

    ``grad`` is dL/dQ in any floating-point dtype, or parts [S, *weight.shape] of it to be added up, each contiguous or
    channels-last.
    """
    weight, levels = posterior.weight, posterior.levels
    N, K = weight.shape[0], weight.shape[1:].numel()
    grid, blocks = blocks_of_matrix(N, K)
    gradients = gradients_of(posterior, grid[1], levels.shape[1])
    parts, taps = parts_of(grad, weight)
    launch(
        sample_bwd_kernel, grid,
        grad, posterior, noise.seed, noise.offset, gradients, N, K, taps, parts, **flags_of_sample(posterior), **blocks,
    )  # fmt: skip
    return sample_gradients(gradients, posterior)


def sample_gradients(gradients, posterior):
    """The gradients of mu, log_sigma2 (empty without it) and levels, from what a kernel has written of them."""
    by_log_sigma2 = posterior.weight.new_empty(0) if gradients.log_sigma2 is None else gradients.log_sigma2
    return gradients.weight, by_log_sigma2, level_sums(gradients.sums, posterior.levels)
