// bfloat16 in memory, float in registers.

typedef uint16_t Bits16 __attribute__((vector_size(2 * BQNN_LANES)));

BQNN_INLINE Float widen(Bits16 bits) { return (Float)(__builtin_convertvector(bits, UInt) << 16); }

BQNN_INLINE Float load_bfloat16_first(const uint16_t* p, int count) {
  Bits16 bits = {};
#if BQNN_LANES == 16
  bits = (Bits16)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1u), p);
#else
  for (int i = 0; i < count; ++i) bits[i] = p[i];
#endif
  return widen(bits);
}

// The nearest bfloat16, ties to even, in the low half of each lane; NaN stays NaN.
BQNN_INLINE UInt bfloat16_lanes(Float x) {
  const UInt bits = (UInt)x, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (UInt)select(x == x, (Int)rounded, Int{} + 0x7FC0);
}

BQNN_INLINE Bits16 round_to_bfloat16(Float x) { return __builtin_convertvector(bfloat16_lanes(x), Bits16); }

BQNN_INLINE void store_bfloat16_first(uint16_t* p, Float x, int count) {
  const Bits16 bits = round_to_bfloat16(x);
  if (count == kLanes) return (void)__builtin_memcpy(p, &bits, sizeof bits);
#if BQNN_LANES == 16
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1u), (__m256i)bits);
#else
  for (int i = 0; i < count; ++i) p[i] = bits[i];
#endif
}
