// Philox4x32-10 and the normal numbers made of its words, as the Python reference has them: element i of a tensor is
// number i % 4 of call `offset + i / 4`.

typedef uint64_t ULong __attribute__((vector_size(4 * BQNN_LANES)));  // two lanes each

// The 64-bit products of the low halves of a's lanes with b.
BQNN_INLINE ULong multiply_low_halves(ULong a, uint32_t b) {
#if BQNN_LANES == 16
  return (ULong)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif BQNN_LANES == 8
  return (ULong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (ULong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFull) * (uint64_t)b;
#endif
}

// The words of one call in each lane; only the low halves of the lanes are meant.
struct PhiloxWords {
  ULong word[4];
};

BQNN_INLINE PhiloxWords philox(ULong call, uint64_t seed) {
  ULong c0 = call, c1 = call >> 32, c2 = {}, c3 = {};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const ULong p0 = multiply_low_halves(c0, 0xD2511F53u), p1 = multiply_low_halves(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of the kLanes calls from `first`, word by word.
struct Words {
  UInt word[4];
};

BQNN_INLINE Words philox_words(uint64_t first, uint64_t seed) {
  ULong even;
  for (int i = 0; i < kLanes / 2; ++i) even[i] = first + 2 * i;
  const PhiloxWords a = philox(even, seed), b = philox(even + 1, seed);
  Words words;
  for (int w = 0; w < 4; ++w) words.word[w] = (UInt)((a.word[w] & 0xFFFFFFFFull) | (b.word[w] << 32));
  return words;
}


// Lane 2 i of the result is a's lane `from` + i, and lane 2 i + 1 b's.
template <class V>
BQNN_INLINE V interleave(V a, V b, int from) {
  Int index;
  for (int i = 0; i < kLanes; ++i) index[i] = from + i / 2 + (i % 2) * kLanes;
  return __builtin_shuffle(a, b, index);
}

template <class V>
BQNN_INLINE void store_calls(const V (&number)[4], void* out) {
  const V a0 = interleave(number[0], number[2], 0), a1 = interleave(number[0], number[2], kLanes / 2);
  const V b0 = interleave(number[1], number[3], 0), b1 = interleave(number[1], number[3], kLanes / 2);
  const V rows[4] = {interleave(a0, b0, 0), interleave(a0, b0, kLanes / 2), interleave(a1, b1, 0),
                     interleave(a1, b1, kLanes / 2)};
  __builtin_memcpy(out, rows, sizeof rows);
}

// The 4 kLanes normal numbers of kLanes calls, in order. Box-Muller: 24 bits of a word are a number that a float holds
// exactly, in (0, 1] for the radius and in [0, 1) turns for the angle.
BQNN_INLINE void store_normals(const Words& words, float* out) {
  Float number[4];
  for (int pair = 0; pair < 2; ++pair) {
    const Float a = to_float((Int)(words.word[2 * pair] >> 8)), b = to_float((Int)(words.word[2 * pair + 1] >> 8));
    const Float square = -2.0f * log_in_range((a + 1.0f) * 0x1p-24f), radius = square * inverse_sqrt(square);
    Float sin, cos;
    sincos_turns(b * 0x1p-24f, &sin, &cos);
    number[2 * pair] = radius * cos;
    number[2 * pair + 1] = radius * sin;
  }
  store_calls(number, out);
}

// The normal numbers of the elements [first, first + count) of a tensor.
inline void fill_normals(const Noise& noise, int64_t first, int64_t count, float* out) {
  constexpr int kNumbers = 4 * kLanes, kAtOnce = 8;
  uint64_t call = noise.offset + (uint64_t)(first / 4);
  int64_t skip = first % 4;
  while (count > 0) {
    // Words and normals have loops of their own: each is one long chain, and several of a kind run side by side.
    Words words[kAtOnce];
    const int64_t left = (skip + count + kNumbers - 1) / kNumbers, vectors = left < kAtOnce ? left : kAtOnce;
    for (int64_t i = 0; i < vectors; ++i) words[i] = philox_words(call + (uint64_t)(i * kLanes), noise.seed);
    for (int64_t i = 0; i < vectors; ++i) {
      if (skip == 0 && count >= kNumbers) {
        store_normals(words[i], out);
        out += kNumbers;
        count -= kNumbers;
        continue;
      }
      float numbers[kNumbers];
      store_normals(words[i], numbers);
      const int64_t taken = kNumbers - skip < count ? kNumbers - skip : count;
      __builtin_memcpy(out, numbers + skip, (size_t)taken * sizeof(float));
      out += taken;
      count -= taken;
      skip = 0;
    }
    call += (uint64_t)(vectors * kLanes);
  }
}

// The words of the calls [first, first + calls), four a call.
inline void random_words(uint64_t seed, uint64_t first, int64_t calls, uint32_t* out) {
  for (int64_t done = 0; done < calls; done += kLanes) {
    const Words words = philox_words(first + (uint64_t)done, seed);
    uint32_t rows[4 * kLanes];
    store_calls(words.word, rows);
    const int64_t count = calls - done < kLanes ? calls - done : kLanes;
    __builtin_memcpy(out + 4 * done, rows, (size_t)count * 4 * sizeof(uint32_t));
  }
}
