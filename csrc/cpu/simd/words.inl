// What products are made of, beside vec.inl: constants as arguments, vectors of 32-bit words, numbers that are float32
// or bfloat16, fused multiplication and addition.
//
// A translation unit includes it after lanes.inl and bfloat16.inl.

// std::integral_constant without the header.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with the constants 0 to kCount - 1.
template <int kCount, int kFirst = 0, class F>
inline __attribute__((always_inline)) void unroll(const F& f) {
  if constexpr (kFirst < kCount) {
    f(Constant<kFirst>{});
    unroll<kCount, kFirst + 1>(f);
  }
}

// --- words and numbers --------------------------------------------------------------------------------------------

BQNN_INLINE UInt load_lanes(const void* p) {
  UInt x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

BQNN_INLINE UInt broadcast_lane(const char* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x - UInt{};
}

BQNN_INLINE Float load_numbers(const float* x, int count) { return load_first(x, count); }
BQNN_INLINE Float load_numbers(const uint16_t* x, int count) { return load_bfloat16_first(x, count); }

BQNN_INLINE void store_numbers(float* p, Float x, int count) { store_first(p, x, count); }
BQNN_INLINE void store_numbers(uint16_t* p, Float x, int count) { store_bfloat16_first(p, x, count); }

// --- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c, in one instruction where there is one: results differ in their last bits between instruction sets.
BQNN_INLINE Float multiply_add(Float a, Float b, Float c) {
#if BQNN_LANES == 16
  return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif BQNN_LANES == 8
  return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The float nearest to x, ties to even, that bfloat16 has; NaN stays NaN, and infinity infinity.
BQNN_INLINE float nearest_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = bits + 0x7FFF + (bits >> 16 & 1), quiet = bits | 0x400000;
  bits = ((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : nearest) & 0xFFFF0000;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// To the nearest integer, and where there is none to any.
BQNN_INLINE Int integers(Float rounded) {
#if BQNN_LANES == 16
  return (Int)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)rounded);
#else
  return to_int(rounded);
#endif
}

#if BQNN_LANES == 16
// The nearest bfloat16, ties to even, and 0 for a denormal number, which is what the product takes it for.
BQNN_INLINE Bits16 bfloat16_operands(Float x) { return (Bits16)_mm512_cvtneps_pbh((__m512)x); }

BQNN_INLINE void store_bits16(uint16_t* to, Bits16 bits, int count) {
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1u), (__m256i)bits);
}
#endif

// The largest magnitude of n numbers; a NaN counts as larger than everything.
template <class X>
__attribute__((noinline)) float largest(const X* x, int64_t n) {
  constexpr int kChains = 4;  // a single chain would wait for each comparison
  Int most[kChains] = {};     // magnitudes of floats compare as integers, NaN above infinity
  const auto see = [&](int64_t i, int chain, int count) __attribute__((always_inline)) {
    const Int bits = as_int(abs(load_numbers(x + i, count)));
    most[chain] = select(bits > most[chain], bits, most[chain]);
  };
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    BQNN_UNROLL(4) for (int chain = 0; chain < kChains; ++chain) see(i + chain * kLanes, chain, kLanes);
  for (; i < n; i += kLanes) see(i, 0, lanes_left(n - i));
  float value = 0.0f;
  int32_t bits = 0;
  for (const Int& of_chain : most)
    for (int lane = 0; lane < kLanes; ++lane) bits = of_chain[lane] > bits ? of_chain[lane] : bits;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
