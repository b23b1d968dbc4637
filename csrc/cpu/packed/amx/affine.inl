// packed_conv2d where levels are offset + scale * step: the sums of activations that the offset multiplies, and what
// makes outputs of the products with steps. The sums of each pixel's channels are kept, a float for each pixel of the
// padded rows of a group; an output adds those under its kernel.

// Sums of the channels of row h of a group of an image.
template <class X>
inline void sum_channels(const PackedCall& call, const X* image, int64_t group, int64_t h, float* sums) {
  const int64_t inputs = call.weight->inputs, width = call.width, pitch = call.x.pixel_stride;
  if (call.x.format == Format::channels_last) {
    const X* x = image + h * width * pitch + group * inputs;
    for (int64_t w = 0; w < width; ++w, x += pitch) {
      Float sum = {};
      for (int64_t c = 0; c < inputs; c += kLanes) sum += load_numbers(x + c, lanes_left(inputs - c));
      sums[w] = _mm512_reduce_add_ps((__m512)sum);
    }
    return;
  }
  const X* x = image + (group * inputs * call.height + h) * width;
  for (int64_t w = 0; w < width; w += kLanes) {
    Float sum[4] = {};
    const int lanes = lanes_left(width - w);
    for (int64_t c = 0; c < inputs; ++c) sum[c % 4] += load_numbers(x + c * call.height * width + w, lanes);
    store_first(sums + w, (sum[0] + sum[1]) + (sum[2] + sum[3]), lanes);
  }
}

// The sums of images [first, first + images), [image][group][`size`]; the border's are 0.
inline void sum_images(const PackedCall& call, const Parallel& parallel, int64_t first, int64_t images, int64_t size,
                       float* sums) {
  const int64_t groups = call.weight->groups, padded_w = call.width + 2 * int64_t{call.padding_w};
  with_elements(call.x, [&](const auto* x) {
    parallel_for(parallel, images * groups, 1 + (1 << 15) / (image_size(call) / groups), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        float* to = sums + i * size;
        __builtin_memset(to, 0, static_cast<size_t>(size) * sizeof(float));
        for (int64_t h = 0; h < call.height; ++h)
          sum_channels(call, x + (first + i / groups) * call.x.image_stride, i % groups, h,
                       to + (h + call.padding_h) * padded_w + call.padding_w);
      }
    });
  });
}

// Turns products with steps, [n][kWidth], into products with levels: row h from column w on, of `width` channels.
inline void apply_levels(const PackedCall& call, const float* sums, int64_t h, int64_t w, int64_t n, int64_t width,
                         float* products) {
  const PackedLayout& layout = *call.weight;
  const int64_t padded_w = call.width + 2 * int64_t{call.padding_w};
  Int columns;
  for (int i = 0; i < kLanes; ++i) columns[i] = i * call.stride_w;
  const __m512d scale = _mm512_set1_pd(layout.affine_scale);
  for (int64_t first = 0; first < n; first += kLanes) {
    Float sum = {};  // the sums of what is under the kernel of 16 outputs
    for (int r = 0; r < layout.kernel_h; ++r) {
      const float* row = sums + (h * call.stride_h + r * call.dilation_h) * padded_w + (w + first) * call.stride_w;
      for (int s = 0; s < layout.kernel_w; ++s, row += layout.dilation_w)
        sum += call.stride_w == 1 ? load(row) : (Float)_mm512_i32gather_ps((__m512i)columns, row, 4);
    }
    for (int64_t i = first; i < smaller(n, first + kLanes); ++i) {
      const __m512d plus = _mm512_set1_pd(layout.affine_offset * sum[i - first]);
      for (int64_t c = 0; c < width; c += 8) {
        float* product = products + i * kWidth + c;
        const __m512d value = _mm512_cvtps_pd(_mm256_loadu_ps(product));
        _mm256_storeu_ps(product, _mm512_cvtpd_ps(_mm512_fmadd_pd(value, scale, plus)));
      }
    }
  }
}
