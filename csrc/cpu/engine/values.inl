// Numbers of a value in memory, float32 or quantized, and floats in registers.

// As many bytes as there are lanes, as integers. (GCC 12 takes the lanes of __builtin_convertvector one by one.)
BQNN_INLINE Int load_bytes(const uint8_t* p) {
#if BQNN_LANES == 16
  return (Int)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif BQNN_LANES == 8
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Int x = {};
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}

// The low byte of each of the first `count` lanes, which are 0 to 255.
BQNN_INLINE void store_bytes(uint8_t* p, Int x, int count) {
#if BQNN_LANES == 16
  if (count == kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)x));
  else
    _mm512_mask_cvtepi32_storeu_epi8(p, (__mmask16)((1u << count) - 1u), (__m512i)x);
#elif BQNN_LANES == 8
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
  if (count == kLanes) return (void)__builtin_memcpy(p, &bytes, sizeof bytes);
  BQNN_UNROLL(4) for (int piece = kLanes / 2; piece > 0; piece /= 2)
    if (count & piece) {
      __builtin_memcpy(p, &bytes, static_cast<size_t>(piece));
      p += piece, bytes >>= 8 * piece;
    }
#else
  for (int i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// To the nearest integer, ties to even, of numbers that are below 2^31, or, where there is no instruction for it, 2^22.
BQNN_INLINE Int nearest_integers(Float x) {
#if BQNN_LANES == 16
  return (Int)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)x);
#elif BQNN_LANES == 8
  return (Int)_mm256_cvtps_epi32((__m256)x);
#else
  return to_int(round(x));
#endif
}

// Vectors of integers that are stored as bytes together, and whether those beyond bytes become 0 or 255 on the way.
constexpr int kBytesTogether = BQNN_LANES == 16 ? 4 : BQNN_LANES == 8 ? 2 : 1;
constexpr bool kSaturates = BQNN_LANES >= 8;

#if BQNN_LANES >= 8
// The first `count` of 16 bytes, in pieces: a store under a mask takes longer.
BQNN_INLINE void store_some(uint8_t* p, __m128i bytes, int count) {
  if (count == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  if (count & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
    p += 8, bytes = _mm_unpackhi_epi64(bytes, bytes);
  }
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(bytes));
  BQNN_UNROLL(4) for (int piece = 4; piece > 0; piece /= 2)
    if (count & piece) {
      __builtin_memcpy(p, &rest, static_cast<size_t>(piece));
      p += piece, rest >>= 8 * piece;
    }
}
#endif

#if BQNN_LANES == 16
// The bytes of four vectors, one after another. Packing goes by quarters of a vector: those of the four come out in
// turns.
BQNN_INLINE __m512i pack_saturated(const Int* x) {
  const __m512i low = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_maskz_permutexvar_epi32(0xFFFF, order, _mm512_packus_epi16(low, high));
}
#elif BQNN_LANES == 8
// The bytes of two vectors, one after another.
BQNN_INLINE __m128i pack_saturated(const Int* x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]), 0xD8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif

// Stores kBytesTogether vectors one after another.
BQNN_INLINE void store_saturated_together(uint8_t* to, const Int* x) {
#if BQNN_LANES >= 8
  const auto bytes = pack_saturated(x);
  __builtin_memcpy(to, &bytes, sizeof bytes);
#else
  store_bytes(to, x[0], kLanes);
#endif
}

// Stores the first `count` lanes of kBytesTogether vectors, each where it belongs.
BQNN_INLINE void store_saturated(uint8_t* const* to, const Int* x, int count = kLanes) {
#if BQNN_LANES == 16
  const __m512i bytes = pack_saturated(x);
  store_some(to[0], _mm512_castsi512_si128(bytes), count);
  store_some(to[1], _mm512_maskz_extracti32x4_epi32(0xF, bytes, 1), count);
  store_some(to[2], _mm512_maskz_extracti32x4_epi32(0xF, bytes, 2), count);
  store_some(to[3], _mm512_maskz_extracti32x4_epi32(0xF, bytes, 3), count);
#elif BQNN_LANES == 8
  const __m128i bytes = pack_saturated(x);
  store_some(to[0], bytes, count);
  store_some(to[1], _mm_unpackhi_epi64(bytes, bytes), count);
#else
  store_bytes(to[0], x[0], count);
#endif
}

// The same of one vector.
BQNN_INLINE void store_saturated(uint8_t* to, Int x, int count) {
#if BQNN_LANES == 16
  x = (Int)_mm512_maskz_max_epi32(0xFFFF, (__m512i)x, __m512i{});
  store_some(to, _mm512_maskz_cvtusepi32_epi8(0xFFFF, (__m512i)x), count);
#else
  store_bytes(to, x, count);  // packing saturates
#endif
}

BQNN_INLINE void store_floats(float* p, Float x, int count) {
#if BQNN_LANES == 8
  if (count == kLanes) return store(p, x);
  __m128 part = _mm256_castps256_ps128((__m256)x);
  if (count & 4) {
    _mm_storeu_ps(p, part);
    p += 4, part = _mm256_extractf128_ps((__m256)x, 1);
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    p += 2, part = _mm_movehl_ps(part, part);
  }
  if (count & 1) _mm_store_ss(p, part);
#else
  store_first(p, x, count);
#endif
}

// Numbers of an element type: how they are read and written. A vector that is read may go on beyond the last number.
template <class Element>
struct Numbers;

template <>
struct Numbers<float> {
  BQNN_INLINE explicit Numbers(const View&) {}
  BQNN_INLINE Float read(const float* p) const { return load(p); }
  static BQNN_INLINE Float stored(const float* p) { return load(p); }
  BQNN_INLINE void write(float* p, Float x, int count) const { store_floats(p, x, count); }
};

template <>
struct Numbers<uint8_t> {
  float scale, inverse, zero;

  BQNN_INLINE explicit Numbers(const View& view)
      : scale(view.scale), inverse(1.0f / view.scale), zero(static_cast<float>(view.zero)) {}
  BQNN_INLINE Float read(const uint8_t* p) const { return (to_float(load_bytes(p)) - zero) * scale; }
  static BQNN_INLINE Float stored(const uint8_t* p) { return to_float(load_bytes(p)); }
  // The nearest, ties to even; a NaN becomes the least.
  BQNN_INLINE Int quantize(Float x) const { return quantize(x, broadcast(-zero), broadcast(255.0f - zero)); }
  // The same where x / scale is clamped to a narrower range, which is what clamping x before comes to.
  BQNN_INLINE Int quantize(Float x, Float least, Float most) const {
    return nearest_integers(min(max(x * inverse, least), most)) + static_cast<int>(zero);
  }
  BQNN_INLINE void write(uint8_t* p, Float x, int count) const { store_bytes(p, quantize(x), count); }
};

// Calls f with a null pointer of the element type.
template <class F>
BQNN_INLINE void with_element(Dtype dtype, const F& f) {
  if (dtype == Dtype::uint8) return f(static_cast<uint8_t*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

template <class Element>
BQNN_INLINE Element* elements(const View& view, int64_t image, int64_t h, int64_t w = 0) {
  return reinterpret_cast<Element*>(view.data) + image * view.image + h * view.row + w * view.pixel;
}

// tanh by the exponential function.
BQNN_INLINE Float hyperbolic_tangent(Float x) {
  const Float e = exp(-2.0f * abs(x)), y = (1.0f - e) / (1.0f + e);
  return select(x < 0.0f, -y, y);
}

constexpr float kSixth = 1.0f / 6.0f;  // a division takes as long as all else

BQNN_INLINE Float hard_gate(Float x) { return min(max(x + 3.0f, broadcast(0.0f)), broadcast(6.0f)); }

BQNN_INLINE Float activate(const Activation& of, Float x) {
  switch (of.function) {
    case Function::clamp: return min(broadcast(of.high), max(broadcast(of.low), x));
    case Function::leaky_relu: return select(x >= 0.0f, x, x * of.low);
    case Function::hardswish: return x * hard_gate(x) * kSixth;
    case Function::hardsigmoid: return hard_gate(x) * kSixth;
    case Function::sigmoid: return sigmoid(x);
    case Function::silu: return x * sigmoid(x);
    case Function::gelu: return x * (0.5f * erfc(x * -0.70710678f));
    case Function::gelu_tanh: {
      // (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel.
      return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));
    }
    case Function::tanh: return hyperbolic_tangent(x);
    default: return x;
  }
}

// Calls f(first channel, how many count) for the channels in vectors. The last vector begins where it is whole, so that
// some channels are computed twice, unless there are too few for one.
template <class F>
BQNN_INLINE void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c == channels) return;
  if (channels > kLanes)
    f(channels - kLanes, kLanes);
  else
    f(c, static_cast<int>(channels - c));
}
