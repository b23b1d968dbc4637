// packed_conv2d where levels are offset + scale * step: the sums of activations that the offset multiplies, and what
// makes outputs of the products with steps. The sums of each pixel's channels are kept, a float for each pixel of the
// padded rows; an output adds those under its kernel.
#pragma once

// Sums of the channels of `pixels` pixels, channels `n` together and pixels `stride` elements apart.
template <class X>
inline void add_channels(const X* x, int64_t n, int64_t stride, int64_t pixels, float* sums) {
  for (int64_t i = 0; i < pixels; ++i, x += stride) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < n; c += 16) sum = _mm512_add_ps(sum, load_activations(x + c, first_lanes(n - c)));
    sums[i] = _mm512_reduce_add_ps(sum);
  }
}

// Adds up the channels, one a vector, of up to 16 pixels.
inline void add_channels(const __m512 v[16], __mmask16 pixels, bool first, float* sums) {
  __m512 sum[4] = {v[0], v[1], v[2], v[3]};
  for (int i = 4; i < 16; ++i) sum[i % 4] = _mm512_add_ps(sum[i % 4], v[i]);
  __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  if (!first) all = _mm512_add_ps(all, _mm512_maskz_loadu_ps(pixels, sums));
  _mm512_mask_storeu_ps(sums, pixels, all);
}

// Turns products with steps, [n][kWidth], into products with levels: row h from column w on, of `width` channels.
inline void apply_levels(const Conv2dCall& call, const float* sums, int64_t padded_w, int64_t h, int64_t w, int64_t n,
                         int64_t width, float* products) {
  const PackedLayout& layout = *call.weight;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i columns = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(call.stride_w));
  const __m512d scale = _mm512_set1_pd(layout.affine_scale);
  for (int64_t first = 0; first < n; first += 16) {
    __m512 sum = _mm512_setzero_ps();  // of what is under the kernel of 16 outputs
    for (int r = 0; r < layout.kernel_h; ++r) {
      const float* row = sums + (h * call.stride_h + r * call.dilation_h) * padded_w + (w + first) * call.stride_w;
      for (int s = 0; s < layout.kernel_w; ++s, row += layout.dilation_w)
        sum = _mm512_add_ps(sum, call.stride_w == 1 ? _mm512_loadu_ps(row) : _mm512_i32gather_ps(columns, row, 4));
    }
    alignas(64) float of_output[16];
    _mm512_store_ps(of_output, sum);
    const int64_t last = n - first < 16 ? n : first + 16;
    for (int64_t i = first; i < last; ++i) {
      const __m512d plus = _mm512_set1_pd(layout.affine_offset * of_output[i - first]);
      for (int64_t c = 0; c < width; c += 8) {
        float* product = products + i * kWidth + c;
        const __m512d value = _mm512_cvtps_pd(_mm256_loadu_ps(product));
        _mm256_storeu_ps(product, _mm512_cvtpd_ps(_mm512_fmadd_pd(value, scale, plus)));
      }
    }
  }
}
