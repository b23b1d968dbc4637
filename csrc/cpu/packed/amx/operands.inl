// What comes before and after the tiles: reading and rounding activations, decoding words, writing outputs.
#pragma once

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

inline __m512 load_activations(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load_activations(const Bf16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline void store_activations(float* y, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(y, mask, value); }
// To nearest, ties to even; the conversion instruction would take a denormal number for zero.
inline void store_activations(Bf16* y, __m512 value, __mmask16 mask) {
  const __m512i bits = _mm512_castps_si512(value),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_mask_storeu_epi16(y, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

inline __m512 magnitude(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}

// bfloat16 nearest to each float of low (lanes 0..15) and high (16..31), ties to even.
inline __m512i to_bf16(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

inline __m512 widen_low(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16));
}
inline __m512 widen_high(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1)), 16));
}

// Three bfloat16 numbers whose sum is the float32, exactly: 24 bits are three times eight.
inline void split(__m512 low, __m512 high, __m512i part[3]) {
  for (int p = 0; p < 3; ++p) {
    part[p] = to_bf16(low, high);
    low = _mm512_sub_ps(low, widen_low(part[p]));
    high = _mm512_sub_ps(high, widen_high(part[p]));
  }
}

// Activations as 32-bit integers in -127..127; nothing is larger than the row's largest, so nothing has to be clamped.
inline __m512i quantize(__m512 x, const RowScale& r) {
  if (r.lift != 1.0f) x = _mm512_mul_ps(x, _mm512_set1_ps(r.lift));
  return _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(r.factor)));
}

// 64 activations, n of them from memory, as bytes in order.
template <class X>
inline __m512i quantize_step(const X* x, int64_t n, const RowScale& r) {
  __m512i q[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t left = n - 16 * i;
    q[i] = quantize(load_activations(x + 16 * i, first_lanes(left > 0 ? left : 0)), r);
  }
  // Packing goes lane by lane of 128 bits: four numbers of each vector in turn.
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), bytes);
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest magnitude of n numbers; a NaN counts as larger than everything. Magnitudes compare as integers, NaN above
// infinity.
inline float largest(const float* x, int64_t n) {
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j)
      most[j] = _mm512_max_epu32(most[j], _mm512_and_si512(_mm512_loadu_si512(x + i + 16 * j), magnitude_bits));
  for (; i < n; i += 16)
    most[0] = _mm512_max_epu32(most[0],
                               _mm512_and_si512(_mm512_maskz_loadu_epi32(first_lanes(n - i), x + i), magnitude_bits));
  return float_of(_mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3]))));
}

inline float largest(const Bf16* x, int64_t n) {
  const __m512i magnitude_bits = _mm512_set1_epi16(0x7FFF);
  __m512i most[2] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 2; ++j)
      most[j] = _mm512_max_epu16(most[j], _mm512_and_si512(_mm512_loadu_si512(x + i + 32 * j), magnitude_bits));
  for (; i < n; i += 32) {
    const __mmask32 lanes = n - i >= 32 ? 0xFFFFFFFFu : (1u << (n - i)) - 1;
    most[0] = _mm512_max_epu16(most[0], _mm512_and_si512(_mm512_maskz_loadu_epi16(lanes, x + i), magnitude_bits));
  }
  const __m512i both = _mm512_max_epu16(most[0], most[1]);
  const uint32_t odd = _mm512_reduce_max_epu32(_mm512_srli_epi32(both, 16));
  const uint32_t even = _mm512_reduce_max_epu32(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF)));
  return float_of((odd > even ? odd : even) << 16);
}

// Whether no magnitude is above that of a float with the bits `most`; NaN is above all.
inline bool fits(__m512 x, int32_t most) {
  return _mm512_cmpgt_epu32_mask(_mm512_castps_si512(magnitude(x)), _mm512_set1_epi32(most)) == 0;
}

// Vectors of decoded weights, 16 channels by the lanes of a channel's word. One codebook for all (kShared): a permute;
// the table is repeated with the period of the code, so the bits above it need no clearing. One codebook a channel: a
// ladder of selects.
template <int kBits, bool kShared>
struct Bf16Decoder {
  __m512i table;  // 32 entries
  __m512i rung[kShared ? 1 : kTable];
  int levels;

  // Of the levels in `entries`; `part` 0 is the level rounded to bfloat16, 1 and 2 what rounding left.
  void start(const PackedLayout& layout, const float* entries, int64_t channel, int part) {
    levels = layout.num_levels;
    if constexpr (kShared) {
      const __m512 t = _mm512_loadu_ps(entries);
      __m512i parts[3];
      split(t, t, parts);
      table = parts[part];
      return;
    }
    const __m512i stride = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(kTable));
    for (int m = 0; m < levels; ++m) {
      const __m512 t = _mm512_i32gather_ps(stride, entries + channel * kTable + m, 4);
      __m512i parts[3];
      split(t, t, parts);
      // The same 16 bits in both halves of the channel's lane.
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(parts[part]));
      rung[m] = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
    }
  }

  __m512i operator()(__m512i word) const {
    if constexpr (kShared) return _mm512_permutexvar_epi16(word, table);
    const __m512i code = _mm512_and_si512(word, _mm512_set1_epi16((1 << kBits) - 1));
    __m512i value = rung[0];
    for (int m = 1; m < levels; ++m)
      value = _mm512_mask_mov_epi16(value, _mm512_cmpge_epu16_mask(code, _mm512_set1_epi16(static_cast<short>(m))),
                                    rung[m]);
    return value;
  }
};

template <int kBits, bool kShared>
struct Int8Decoder {
  __m512i table;  // 64 entries
  __m512i rung[kShared ? 1 : kTable];
  int levels;

  void start(const PackedLayout& layout, int64_t channel) {
    levels = layout.num_levels;
    const int8_t* entries = layout.int8_table();
    if constexpr (kShared) {
      table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
      return;
    }
    for (int m = 0; m < levels; ++m) {
      alignas(64) int8_t bytes[64];
      for (int lane = 0; lane < 64; ++lane) bytes[lane] = entries[(channel + lane / 4) * kTable + m];
      rung[m] = _mm512_load_si512(bytes);
    }
  }

  __m512i operator()(__m512i word) const {
    if constexpr (kShared) return _mm512_permutexvar_epi8(word, table);
    const __m512i code = _mm512_and_si512(word, _mm512_set1_epi8((1 << kBits) - 1));
    __m512i value = rung[0];
    for (int m = 1; m < levels; ++m)
      value =
          _mm512_mask_mov_epi8(value, _mm512_cmpge_epu8_mask(code, _mm512_set1_epi8(static_cast<char>(m))), rung[m]);
    return value;
  }
};

inline __m512 load_products(const float* product) { return _mm512_loadu_ps(product); }
inline __m512 load_products(const int32_t* product) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(product)); }

// Outputs of n channels at `positions` positions, products kWidth apart and outputs `stride`: a float product plus the
// bias, or an integer one times the channel's step and the row's scale plus the bias, each operation rounded by itself;
// `least` as least_output has it.
template <class P, class Y>
inline void finish_row(const P* product, int64_t positions, int64_t n, const float* bias, const float* step,
                       float scale, float least, Y* y, int64_t stride) {
  for (int64_t c = 0; c < n; c += 16) {
    const __mmask16 lanes = first_lanes(n - c);
    const __m512 factor = step ? _mm512_maskz_loadu_ps(lanes, step + c) : _mm512_setzero_ps();
    const __m512 offset = bias ? _mm512_maskz_loadu_ps(lanes, bias + c) : _mm512_setzero_ps();
    for (int64_t i = 0; i < positions; ++i) {
      __m512 value = load_products(product + i * kWidth + c);
      if (step) value = _mm512_mul_ps(_mm512_mul_ps(value, factor), _mm512_set1_ps(scale));
      if (bias) value = _mm512_add_ps(value, offset);
      value = _mm512_max_ps(_mm512_set1_ps(least), value);  // of NaN or two zeros, the second
      store_activations(y + i * stride + c, value, lanes);
    }
  }
}

// Rows become columns.
inline void transpose(__m512 v[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}
