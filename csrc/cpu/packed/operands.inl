// What kernels multiply: a 32-bit lane holds one float, or a few bfloat16 numbers or integers of one channel that follow
// each other in K.
//
// An operand class provides
//
//     Element, kUnit     an activation as the kernels read it, and how many fill a lane
//     kInt8, kBfloat16   whether it multiplies integers, or bfloat16 numbers
//     kZero              what stands for an activation of 0
//     Sum                a vector of running sums, over at most kChunk lanes
//     Product            what the sums of all chunks add up to

// Lanes of K whose weights are decoded together: their panel stays in the L1 cache.
constexpr int kChunk = 128;

struct FloatOperand {
  using Element = float;
  using Product = float;
  using Sum = Float;
  static constexpr bool kInt8 = false, kBfloat16 = false;
  static constexpr int kUnit = 1;
  static constexpr float kZero = 0.0f;

  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) { return multiply_add((Float)x, (Float)w, sum); }
  static BQNN_INLINE UInt add(UInt product, Sum sum) { return (UInt)((Float)product + sum); }
  static BQNN_INLINE UInt add(UInt a, UInt b) { return add(a, (Float)b); }
};

#if BQNN_LANES == 16
// Pairs of bfloat16. The instruction takes denormal numbers for zeros.
struct Bfloat16Operand : FloatOperand {
  using Element = Bfloat16;
  static constexpr bool kBfloat16 = true;
  static constexpr int kUnit = 2;
  static constexpr Element kZero = 0;

  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) {
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#else
// Pairs of bfloat16 are multiplied as the floats they are.
using Bfloat16Operand = FloatOperand;
#endif

// Sums of 8-bit products fit 32 bits: integer_limit of the Python reference keeps K * 127 * max|n| below 2^31. On the way
// they may wrap around, so they are unsigned.
struct Int8Operand {
  using Product = int32_t;
  static constexpr bool kInt8 = true, kBfloat16 = false;
#if BQNN_LANES == 16
  // vpdpbusd takes one unsigned operand: x + 128, and what that adds is subtracted at the end.
  using Element = uint8_t;
  using Sum = UInt;
  static constexpr int kUnit = 4, kZero = kInt8Offset;
  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) {
    return (UInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
  static BQNN_INLINE UInt add(UInt product, Sum sum) { return product + sum; }
#elif BQNN_LANES == 8
  // Pairs of 16 bits: sums of the 8-bit pmaddubsw would saturate.
  using Element = int16_t;
  using Sum = UInt;
  static constexpr int kUnit = 2, kZero = 0;
  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) {
    return sum + (UInt)_mm256_madd_epi16((__m256i)x, (__m256i)w);
  }
  static BQNN_INLINE UInt add(UInt product, Sum sum) { return product + sum; }
#else
  // SSE2 and NEON multiply floats best, and those hold the sums of a chunk exactly.
  using Element = float;
  using Sum = Float;
  static constexpr int kUnit = 1;
  static constexpr float kZero = 0.0f;
  static_assert(kChunk * 127 * 127 <= 1 << 24, "beyond, floats are not all the integers");
  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) { return multiply_add((Float)x, (Float)w, sum); }
  static BQNN_INLINE UInt add(UInt product, Sum sum) { return product + (UInt)to_int(sum); }
#endif
};

#if BQNN_LANES == 16
// Signed 8-bit activations, for tiles and for kernels that have the weights as vpdpbusd's unsigned operand.
struct SignedOperand : Int8Operand {
  using Element = int8_t;
  static constexpr int kZero = 0;
  static BQNN_INLINE Sum dot(UInt x, UInt w, Sum sum) { return Int8Operand::dot(w, x, sum); }
};
#endif
