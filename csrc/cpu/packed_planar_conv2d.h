// packed_conv2d in floats with few output channels, contiguous: lanes are pixels of a row and weights are broadcast, so
// that 12 channels, or one of a depthwise layer, leave no lanes of a block empty, and nothing is transposed. Works on a
// zero-padded copy of each image.
//
// Included inside the namespace of a translation unit that has set the target, after packed_vector_conv2d.h.
#pragma once

constexpr int kRegisters = BQNN_LANES == 16 ? 32 : 16;
constexpr int kMostChannels = BQNN_LANES == 16 ? 12 : 6;  // that are multiplied together
constexpr int kMostRuns = 8;                              // of pixels, likewise
constexpr int64_t kColumnsOfSum = 256;                    // added up in one float: error grows with the number of terms

// Vectors of pixels whose sums for so many channels fit the registers, beside the pixels themselves and a weight.
constexpr int planar_vectors(int channels) {
  const int fit = (kRegisters - 1) / (channels + 1);
  return fit < kMostRuns ? fit : kMostRuns;
}

// A run of pixels: where the first of its inputs and its outputs stand, and how many lanes of it are outputs.
struct PixelRun {
  const float* x;
  float* y;
  int lanes;
};

// Outputs of channels `channel`, `channel` + 1, ... of a few runs; those of a channel are `plane` floats from the next
// one's. weight [columns][kBlock]; offset [columns] leads from a run to what a column multiplies.
template <int kChannels>
__attribute__((noinline)) void multiply_runs(const PixelRun* runs, int64_t plane, int64_t channel,
                                             const int64_t* offset, const float* weight, int64_t columns,
                                             const float* bias, float least) {
  constexpr int kVectors = planar_vectors(kChannels);
  const float* x[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) x[v] = runs[v].x;
  for (int64_t first = 0; first < columns; first += kColumnsOfSum) {
    const bool last = columns - first <= kColumnsOfSum;
    const int64_t end = last ? columns : first + kColumnsOfSum;
    Float sum[kChannels][kVectors] = {};
    for (int64_t k = first; k < end; ++k, weight += kBlock) {
      Float pixels[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) pixels[v] = load(x[v] + offset[k]);
#pragma GCC unroll 12
      for (int c = 0; c < kChannels; ++c) {
        const Float w = broadcast(weight[channel + c]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[c][v] = multiply_add(w, pixels[v], sum[c][v]);
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = runs[v].y + (channel + c) * plane;
        if (first > 0) sum[c][v] += load_first(to, runs[v].lanes);
        if (last && bias) sum[c][v] += bias[channel + c];
        if (last) sum[c][v] = max(broadcast(least), sum[c][v]);
        store_first(to, sum[c][v], runs[v].lanes);
      }
  }
}

template <int kChannels = kMostChannels>
inline auto planar_kernel(int channels) {
  if constexpr (kChannels > 1)
    if (channels < kChannels) return planar_kernel<kChannels - 1>(channels);
  return &multiply_runs<kChannels>;
}

// Where things stand in the copy: [image][channel][height][width], in floats.
struct PlanarPlan {
  int64_t row, plane, image;
  int64_t wave;  // images that are copied and multiplied together
};

inline PlanarPlan plan_planes(const Conv2dCall& call, int threads) {
  const PackedLayout& layout = *call.weight;
  PlanarPlan p;
  p.row = call.width + 2 * call.padding_w;
  p.plane = (call.height + 2 * call.padding_h) * p.row;
  if (p.plane % 256 == 0) p.plane += kBlock;  // planes would meet in a few sets of the caches
  p.image = layout.inputs * layout.groups * p.plane;
  p.wave = images_of_wave(call, p.image * static_cast<int64_t>(sizeof(float)), threads);
  return p;
}

template <class X>
inline void pack_planes(const Conv2dCall& call, const PlanarPlan& plan, const Parallel& parallel, const X* x,
                        int64_t images, float* planes) {
  const PackedLayout& layout = *call.weight;
  const bool bf16 = layout.precision == Precision::bf16;
  const int64_t channels = layout.inputs * layout.groups, size = call.height * call.width;
  const int64_t padding = call.padding_h * plan.row + call.padding_w;
  parallel_for(parallel, images * channels, 1 + (1 << 15) / plan.plane, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* plane = planes + i * plan.plane;
      if (padding > 0) __builtin_memset(plane, 0, static_cast<size_t>(plan.plane) * sizeof(float));
      for (int64_t h = 0; h < call.height; ++h)
        pack_row<FloatOperand>(x + i * size + h * call.width, call.width, bf16, RowScale{},
                               plane + padding + h * plan.row);
    }
  });
}

// The weights of a group, [input][r][s][kBlock].
inline void decode_columns(const PackedLayout& layout, int64_t group, float* weight) {
  Codebook book;
  read_codebook<FloatOperand>(layout, group, 0, &book);
  const int64_t padded = layout.segments * layout.padded, taps = layout.taps();
  auto* panel = reinterpret_cast<uint32_t*>(scratch(Scratch::panel, static_cast<size_t>(padded * kBlock) * 4));
  decode<FloatOperand>(layout, book, layout.block(group, 0), padded, panel, kBlock);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t input = 0; input < layout.inputs; ++input) {
      const int64_t at = tap * layout.inputs + input;
      const int64_t lane = at / layout.segment * layout.padded + at % layout.segment;
      __builtin_memcpy(weight + (input * taps + tap) * kBlock, panel + lane * kBlock, kBlock * sizeof(float));
    }
}

template <class X>
void run_planar_conv2d_of(const Conv2dCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, count = layout.group_channels(), taps = layout.taps();
  const int together = static_cast<int>(ceil_div(count, ceil_div(count, kMostChannels)));
  const int64_t vectors = planar_vectors(together), across = ceil_div(call.out_width, kLanes);
  const int64_t positions = call.out_height * call.out_width;
  const auto multiply = planar_kernel(together);
  const PlanarPlan plan = plan_planes(call, parallel.threads);
  auto* planes = reinterpret_cast<float*>(
      scratch(Scratch::activations, static_cast<size_t>(plan.wave * plan.image + 2 * kBlock) * sizeof(float)));
  auto* offset = reinterpret_cast<int64_t*>(
      scratch(Scratch::offsets, static_cast<size_t>(layout.columns) * sizeof(int64_t)));
  for (int64_t k = 0; k < layout.columns; ++k)
    offset[k] = k / taps * plan.plane + k % taps / layout.kernel_w * call.dilation_h * plan.row +
                k % layout.kernel_w * layout.dilation_w;

  for (int64_t first_image = 0; first_image < call.images; first_image += plan.wave) {
    const int64_t images = call.images - first_image < plan.wave ? call.images - first_image : plan.wave;
    const X* x = static_cast<const X*>(call.x) + first_image * layout.inputs * groups * call.height * call.width;
    X* y = static_cast<X*>(call.y) + first_image * layout.channels * positions;
    pack_planes(call, plan, parallel, x, images, planes);

    int64_t bands = ceil_div(4 * parallel.threads, images * groups);  // of rows
    bands = bands < call.out_height ? bands : call.out_height;
    const int64_t work = count * layout.columns * positions / bands;
    parallel_for(parallel, groups * images * bands, 1 + kTaskWork / (1 + work), [&](int64_t begin, int64_t end) {
      auto* weight = reinterpret_cast<float*>(
          scratch(Scratch::tables, static_cast<size_t>(layout.columns * kBlock) * sizeof(float)));
      auto* rounded_later = reinterpret_cast<float*>(
          scratch(Scratch::products, static_cast<size_t>(kBlock * kMostRuns * kLanes) * sizeof(float)));
      int64_t decoded = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t band = task % bands, image = task / bands % images, group = task / bands / images;
        if (group != decoded) decode_columns(layout, group, weight);
        decoded = group;
        const float* from = planes + image * plan.image + group * layout.inputs * plan.plane;
        X* to = y + (image * layout.channels + group * count) * positions;
        const float* bias = call.bias ? call.bias + group * count : nullptr;
        const int64_t row = call.out_height * band / bands, last_row = call.out_height * (band + 1) / bands;
        const int64_t last = (last_row - row) * across;
        for (int64_t first = 0; first < last; first += vectors) {
          PixelRun runs[kMostRuns];
          int64_t pixel[kMostRuns];
          for (int64_t i = 0; i < vectors; ++i) {
            const int64_t of = first + i < last ? first + i : first, h = row + of / across, w = of % across * kLanes;
            pixel[i] = h * call.out_width + w;
            runs[i] = {from + h * call.stride_h * plan.row + w, nullptr,
                       first + i < last ? lanes_left(call.out_width - w) : 0};
            if constexpr (sizeof(X) == sizeof(float)) {
              runs[i].y = to + pixel[i];
            } else {
              runs[i].y = rounded_later + i * kLanes;
            }
          }
          const int64_t plane = sizeof(X) == sizeof(float) ? positions : kMostRuns * kLanes;
          for (int64_t c = 0; c < count; c += together) {
            const int64_t channel = c + together <= count ? c : count - together;  // the last ones, some perhaps again
            multiply(runs, plane, channel, offset, weight, layout.columns, bias, least_output(call.relu));
          }
          if constexpr (sizeof(X) < sizeof(float))
            for (int64_t c = 0; c < count; ++c)
              for (int64_t i = 0; i < vectors; ++i)
                store_outputs(to + c * positions + pixel[i], load(runs[i].y + c * plane), runs[i].lanes);
        }
      }
    });
  }
}

// Whether this was a call that rows of pixels suit, and all of y is written.
template <class X>
inline bool run_planar_conv2d(const Conv2dCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  if (call.channels_last || layout.blocks > 1 || call.stride_w > 1) return false;
  if (call.images == 0 || call.out_height * call.out_width == 0) return false;
  // Lanes in use, of pixels and of channels; a block of channels alone is held up by its broadcasts (measured: 0.85).
  const int64_t width = ceil_div(call.out_width, kLanes) * kLanes;
  if (100 * call.out_width * kBlock < 85 * layout.group_channels() * width) return false;
  run_planar_conv2d_of<X>(call, parallel);
  return true;
}
