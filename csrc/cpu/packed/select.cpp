#include "cpu/packed/select.h"

#include <initializer_list>

namespace bqnn {

// What the translation unit of each instruction set has.
#define BQNN_VECTOR_KERNELS(isa)                                                        \
  namespace isa {                                                                       \
  PackedKernel linear_fp32, linear_bf16, linear_int8;                                   \
  PackedKernel conv2d_fp32, conv2d_bf16, conv2d_int8, planar_fp32, planar_bf16, planar_int8; \
  }

BQNN_VECTOR_KERNELS(scalar)
#if defined(__x86_64__)
BQNN_VECTOR_KERNELS(avx2)
BQNN_VECTOR_KERNELS(avx512)
namespace avx512 {
PackedKernel lookup_linear, lookup_conv2d, gemv_fp32, gemv_bf16, gemv_int8;
}
namespace amx {
PackedKernel linear_bf16, linear_int8, conv2d_fp32, conv2d_fp32_affine, conv2d_bf16, conv2d_int8;
}
#endif

namespace {

bool always(const PackedCall&) { return true; }

#if defined(__x86_64__)
// From so many blocks on, with more than a few rows, tables of sums cost less than decoding for a product.
constexpr int64_t kLookupBlocks = 8;

bool few_rows(const PackedCall& call) { return call.images >= 1 && call.images <= kFewRows; }
bool several_rows(const PackedCall& call) { return call.images > 1; }
bool lookup_pays(const PackedCall& call) { return call.weight->blocks >= kLookupBlocks || few_rows(call); }

// A tile of fewer rows is too empty (measured): kernels that write no decoded weights are faster.
bool rows_fill_a_tile(const PackedCall& call) { return call.images > 4; }
#endif

// Whether lanes of pixels take less time than lanes of channels: by what fills the lanes. A lane of pixels holds
// `pixel_unit` inputs, a lane of channels `channel_unit` weights. A block of channels alone is held up by its
// broadcasts, and channels-last pixels by their transposition.
bool planar_pays(const PackedCall& call, int lanes, int pixel_unit, int channel_unit) {
  const PackedLayout& layout = *call.weight;
  if (layout.blocks > 1 || call.stride_w > 1) return false;
  const int64_t width = (call.out_width + lanes - 1) / lanes * lanes;
  const int64_t of_pixels = (layout.inputs + pixel_unit - 1) / pixel_unit * layout.taps();
  const int64_t of_channels = layout.segments * ((layout.segment + channel_unit - 1) / channel_unit);
  const int64_t percent = call.x.format == Format::channels_last ? 110 : 85;  // measured
  return percent * of_pixels * width * layout.group_channels <= 100 * of_channels * call.out_width * kBlock;
}

template <int kLanes, int kPixelUnit, int kChannelUnit>
bool planar_pays(const PackedCall& call) { return planar_pays(call, kLanes, kPixelUnit, kChannelUnit); }

#if defined(__x86_64__)
// Pairs of bfloat16 never mix two pixels or two segments, of which one may be infinite and its weight none.
bool segments_are_pairs(const PackedCall& call) { return call.weight->segment % 2 == 0; }
bool planar_pairs_pay(const PackedCall& call) { return call.weight->inputs % 2 == 0 && planar_pays<16, 2, 2>(call); }
bool planar_bf16_as_fp32_pays(const PackedCall& call) {
  return call.weight->inputs % 2 != 0 &&
         (segments_are_pairs(call) ? planar_pays<16, 1, 2>(call) : planar_pays<16, 1, 1>(call));
}

// Strides may leave out most of the pixels that have tables.
bool lookup_conv2d_pays(const PackedCall& call) {
  if (call.out_height * call.out_width == 0) return false;
  const LookupTile t = lookup_tile(call);
  return t.height * t.width <= t.out_height * t.out_width * call.weight->taps();
}

// Below, the third part of a level is no longer a normal number, which tiles take for 0.
constexpr float kLeastSplitLevel = 0x1p-100f;

// Of 16 channels or fewer, FMA wins where the products of parts are mostly of padding (measured).
bool split_pays(const PackedCall& call) {
  constexpr int64_t kTile = 16;
  const PackedLayout& layout = *call.weight;
  if (layout.least_level < kLeastSplitLevel) return false;
  if (layout.blocks > 1) return true;
  const int64_t tiles = (call.out_height * (call.width + 2 * int64_t{call.padding_w}) + kTile - 1) / kTile;
  const int64_t computed = tiles * kTile * layout.segments * layout.padded;
  return computed * 2 <= 3 * call.out_height * call.out_width * layout.columns;
}
bool affine_split_pays(const PackedCall& call) { return call.weight->affine != 0 && split_pays(call); }

bool few_levels(const PackedLayout& layout) { return layout.codebooks == 1 && layout.num_levels <= 3; }
bool few_levels_and_many_blocks(const PackedLayout& layout) {
  return few_levels(layout) && layout.blocks >= kLookupBlocks;
}
#endif
bool any_layer(const PackedLayout&) { return true; }

constexpr unsigned of(Isa isa) { return 1u << static_cast<int>(isa); }

struct Row {
  unsigned isas;
  Precision precision;
  bool (*fits)(const PackedCall&);     // whether the kernel suits a call, of a layer that it serves
  bool (*serves)(const PackedLayout&);
  LayoutForm form;                     // what it reads
  PackedKernel* run;
  const char* name;
};

constexpr Precision kFp32 = Precision::fp32, kBf16 = Precision::bf16, kInt8 = Precision::int8;
constexpr LayoutForm kWords = LayoutForm::words;
[[maybe_unused]] constexpr unsigned kScalar = of(Isa::scalar), kAvx2 = of(Isa::avx2), kAvx512 = of(Isa::avx512),
                                    kAmx = of(Isa::amx), kAvx512Up = kAvx512 | kAmx;

constexpr std::initializer_list<Row> kLinear = {
#if defined(__x86_64__)
    {kAmx, kBf16, several_rows, any_layer, kWords, amx::linear_bf16, "AMX bf16 panel"},
    {kAmx, kInt8, rows_fill_a_tile, any_layer, kWords, amx::linear_int8, "AMX int8 panel"},
    {kAvx512Up, kFp32, lookup_pays, few_levels, LayoutForm::sum_indices, avx512::lookup_linear, "AVX-512 fp32 lookup"},
    {kAvx512Up, kFp32, few_rows, any_layer, kWords, avx512::gemv_fp32, "AVX-512 fp32 gemv"},
    {kAvx512Up, kBf16, few_rows, any_layer, kWords, avx512::gemv_bf16, "AVX-512 bf16 pairs gemv"},
    {kAvx512Up, kInt8, few_rows, any_layer, kWords, avx512::gemv_int8, "AVX-512 int8 gemv"},
    {kAvx512Up, kFp32, always, any_layer, kWords, avx512::linear_fp32, "AVX-512 fp32 panel"},
    {kAvx512Up, kBf16, always, any_layer, kWords, avx512::linear_bf16, "AVX-512 bf16 pairs panel"},
    {kAvx512Up, kInt8, always, any_layer, kWords, avx512::linear_int8, "AVX-512 int8 panel"},
    {kAvx2, kFp32, always, any_layer, kWords, avx2::linear_fp32, "AVX2 fp32 panel"},
    {kAvx2, kBf16, always, any_layer, kWords, avx2::linear_bf16, "AVX2 bf16 as fp32 panel"},
    {kAvx2, kInt8, always, any_layer, kWords, avx2::linear_int8, "AVX2 int16 panel"},
#endif
    {kScalar, kFp32, always, any_layer, kWords, scalar::linear_fp32, "scalar fp32 panel"},
    {kScalar, kBf16, always, any_layer, kWords, scalar::linear_bf16, "scalar bf16 as fp32 panel"},
    {kScalar, kInt8, always, any_layer, kWords, scalar::linear_int8, "scalar int8 as fp32 panel"},
};

constexpr std::initializer_list<Row> kConv2d = {
#if defined(__x86_64__)
    {kAmx, kFp32, affine_split_pays, any_layer, kWords, amx::conv2d_fp32_affine, "AMX fp32 affine in bf16 parts panel"},
    {kAmx, kFp32, split_pays, any_layer, kWords, amx::conv2d_fp32, "AMX fp32 in bf16 parts panel"},
    {kAmx, kBf16, always, any_layer, kWords, amx::conv2d_bf16, "AMX bf16 panel"},
    {kAmx, kInt8, always, any_layer, kWords, amx::conv2d_int8, "AMX int8 panel"},
    {kAvx512, kFp32, lookup_conv2d_pays, few_levels_and_many_blocks, LayoutForm::sum_indices, avx512::lookup_conv2d,
     "AVX-512 fp32 lookup"},
    {kAvx512Up, kFp32, planar_pays<16, 1, 1>, any_layer, kWords, avx512::planar_fp32, "AVX-512 fp32 planar"},
    {kAvx512Up, kBf16, planar_pairs_pay, any_layer, kWords, avx512::planar_bf16, "AVX-512 bf16 pairs planar"},
    {kAvx512Up, kBf16, planar_bf16_as_fp32_pays, any_layer, kWords, avx512::planar_fp32,
     "AVX-512 bf16 as fp32 planar"},
    {kAvx512Up, kInt8, planar_pays<16, 4, 4>, any_layer, kWords, avx512::planar_int8, "AVX-512 int8 planar"},
    {kAvx512Up, kFp32, always, any_layer, kWords, avx512::conv2d_fp32, "AVX-512 fp32 panel"},
    {kAvx512Up, kBf16, segments_are_pairs, any_layer, kWords, avx512::conv2d_bf16, "AVX-512 bf16 pairs panel"},
    {kAvx512Up, kBf16, always, any_layer, kWords, avx512::conv2d_fp32, "AVX-512 bf16 as fp32 panel"},
    {kAvx512Up, kInt8, always, any_layer, kWords, avx512::conv2d_int8, "AVX-512 int8 panel"},
    {kAvx2, kFp32, planar_pays<8, 1, 1>, any_layer, kWords, avx2::planar_fp32, "AVX2 fp32 planar"},
    {kAvx2, kBf16, planar_pays<8, 1, 1>, any_layer, kWords, avx2::planar_bf16, "AVX2 bf16 as fp32 planar"},
    {kAvx2, kInt8, planar_pays<8, 2, 2>, any_layer, kWords, avx2::planar_int8, "AVX2 int16 planar"},
    {kAvx2, kFp32, always, any_layer, kWords, avx2::conv2d_fp32, "AVX2 fp32 panel"},
    {kAvx2, kBf16, always, any_layer, kWords, avx2::conv2d_bf16, "AVX2 bf16 as fp32 panel"},
    {kAvx2, kInt8, always, any_layer, kWords, avx2::conv2d_int8, "AVX2 int16 panel"},
#endif
    {kScalar, kFp32, planar_pays<4, 1, 1>, any_layer, kWords, scalar::planar_fp32, "scalar fp32 planar"},
    {kScalar, kBf16, planar_pays<4, 1, 1>, any_layer, kWords, scalar::planar_bf16, "scalar bf16 as fp32 planar"},
    {kScalar, kInt8, planar_pays<4, 1, 1>, any_layer, kWords, scalar::planar_int8, "scalar int8 as fp32 planar"},
    {kScalar, kFp32, always, any_layer, kWords, scalar::conv2d_fp32, "scalar fp32 panel"},
    {kScalar, kBf16, always, any_layer, kWords, scalar::conv2d_bf16, "scalar bf16 as fp32 panel"},
    {kScalar, kInt8, always, any_layer, kWords, scalar::conv2d_int8, "scalar int8 as fp32 panel"},
};

const std::initializer_list<Row>& rows_of(PackedOp op) { return op == PackedOp::linear ? kLinear : kConv2d; }

}  // namespace

const char* run_packed(PackedOp op, Isa isa, const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  for (const Row& row : rows_of(op)) {
    if (!(row.isas & of(isa)) || row.precision != layout.precision) continue;
    if (row.form != LayoutForm::words && row.form != layout.form) continue;
    if (row.serves(layout) && row.fits(call) && row.run(call, parallel)) return row.name;
  }
  return "";  // not reached: the last row of every precision fits every call, and multiplies every number
}

LayoutForm form_read(PackedOp op, Isa isa, const PackedWeight& weight) {
  const PackedLayout layout = plan_layout(weight);
  for (const Row& row : rows_of(op))
    if (row.isas & of(isa) && row.precision == layout.precision && row.form != kWords && row.serves(layout))
      return row.form;
  return kWords;
}

}  // namespace bqnn
