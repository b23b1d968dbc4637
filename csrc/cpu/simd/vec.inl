// Vectors of float32 and the elementary functions on them: the same source for every instruction set.
//
// A translation unit defines BQNN_LANES (16, 8 or 4) and includes this file, and the kernels that use it, inside a
// namespace of its own. There is no fused multiply-add anywhere (-ffp-contract=off), so that a kernel that treats
// elements one by one gives the same bits on every instruction set.
//
// Included once in a translation unit, so there is no guard. Needs <cstdint> and, on x86, <immintrin.h>.

#define BQNN_INLINE inline __attribute__((always_inline))
#define BQNN_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

// BQNN_UNROLL(n) before a loop unrolls it.
#define BQNN_PRAGMA(text) _Pragma(#text)
#define BQNN_UNROLL(n) BQNN_PRAGMA(GCC unroll n)

constexpr int kLanes = BQNN_LANES;

typedef float Float __attribute__((vector_size(4 * BQNN_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * BQNN_LANES)));
typedef uint32_t UInt __attribute__((vector_size(4 * BQNN_LANES)));
typedef Int Mask;  // a comparison's result: all bits of a lane, or none

// --- memory -----------------------------------------------------------------------------------------------------

BQNN_INLINE Float broadcast(float x) { return x - Float{}; }

BQNN_INLINE Float load(const float* p) {
  Float x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

BQNN_INLINE void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

// The first `count` lanes, 0 <= count <= kLanes, from memory and `fill` in the others.
BQNN_INLINE Float load_first(const float* p, int count, float fill = 0.0f) {
  if (count == kLanes) return load(p);
#if BQNN_LANES == 16
  return (Float)_mm512_mask_loadu_ps((__m512)broadcast(fill), (__mmask16)((1u << count) - 1u), p);
#else
  float padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = i < count ? p[i] : fill;
  return load(padded);
#endif
}

BQNN_INLINE void store_first(float* p, Float x, int count) {
  if (count == kLanes) return store(p, x);
#if BQNN_LANES == 16
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)x);
#else
  for (int i = 0; i < count; ++i) p[i] = x[i];
#endif
}

// --- lanes ------------------------------------------------------------------------------------------------------

BQNN_INLINE Float select(Mask mask, Float yes, Float no) { return mask ? yes : no; }
BQNN_INLINE Int select(Mask mask, Int yes, Int no) { return mask ? yes : no; }

// As MAXPS and MINPS: where one of the two is NaN, the second.
BQNN_INLINE Float max(Float a, Float b) {
#if BQNN_LANES == 16
  return (Float)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);  // GCC 12 makes two instructions of a > b ? a : b
#else
  return a > b ? a : b;
#endif
}

BQNN_INLINE Float min(Float a, Float b) {
#if BQNN_LANES == 16
  return (Float)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// NaN stays NaN.
BQNN_INLINE Float clamp(Float x, float low, float high) { return min(broadcast(high), max(broadcast(low), x)); }

BQNN_INLINE Int as_int(Float x) { return (Int)x; }
BQNN_INLINE Float as_float(Int x) { return (Float)x; }
BQNN_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
// Rounds towards zero; |x| has to be below 2^31.
BQNN_INLINE Int to_int(Float x) { return __builtin_convertvector(x, Int); }

BQNN_INLINE Float abs(Float x) { return as_float(as_int(x) & 0x7FFFFFFF); }

constexpr float kIntegers = 12582912.0f;  // 1.5 * 2^23: from here on floats are integers

// To the nearest integer, ties to even; |x| has to be below 2^22.
BQNN_INLINE Float round(Float x) { return (x + kIntegers) - kIntegers; }

// Whether any lane of a mask is set.
BQNN_INLINE bool any(Mask mask) {
#if BQNN_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif BQNN_LANES == 8
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

BQNN_INLINE Float sqrt(Float x) {
#if BQNN_LANES == 16
  return (Float)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);  // GCC 12 warns of the one without a mask
#elif BQNN_LANES == 8
  return (Float)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Float)_mm_sqrt_ps((__m128)x);
#else
  Float y = {};
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// 1 / sqrt(x) to a few units in the last place, for x > 0 that is finite and no denormal number; finite at 0. Takes half
// the time of a root.
BQNN_INLINE Float inverse_sqrt(Float x) {
  const Float half = 0.5f * x;
  Float y = as_float((Int)(0x5F375A86u - (UInt)(as_int(x) >> 1)));  // unsigned: wraps where x is negative
  for (int i = 0; i < 3; ++i) y = y * (1.5f - half * y * y);
  return y;
}

// --- functions, to a few units in the last place: exp and log 1, log1p 2, erfc 5 -----------

// c[0] + c[1] x + ... by Horner's rule, which rounds the least.
template <int N>
BQNN_INLINE Float polynomial(Float x, const float (&c)[N]) {
  Float y = broadcast(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// table[index mod 32], lane by lane.
BQNN_INLINE Float look_up(const float (&table)[32], Int index) {
#if BQNN_LANES == 16
  return (Float)_mm512_permutex2var_ps((__m512)load(table), (__m512i)index, (__m512)load(table + 16));
#elif BQNN_LANES == 8
  return (Float)_mm256_i32gather_ps(table, (__m256i)(index & 31), 4);
#else
  Float x = {};
  for (int i = 0; i < kLanes; ++i) x[i] = table[index[i] & 31];
  return x;
#endif
}

// x, x^2, x^4 and x^8.
struct Powers {
  Float of[4];
};

BQNN_INLINE Powers powers(Float x) {
  const Float square = x * x, fourth = square * square;
  return {{x, square, fourth, fourth * fourth}};
}

// term(first) + term(first + 1) x + ..., N <= 16 terms, by Estrin's scheme: as many operations as by Horner's rule, but
// chains of log2(N) of them, and it is chains that processors wait for.
template <int N, int first, class Term>
BQNN_INLINE Float sum_of_terms(const Powers& x, const Term& term) {
  if constexpr (N == 1) {
    return term(first);
  } else {
    constexpr int kLog = N > 8 ? 3 : N > 4 ? 2 : N > 2 ? 1 : 0, kHalf = 1 << kLog;
    return sum_of_terms<kHalf, first>(x, term) + sum_of_terms<N - kHalf, first + kHalf>(x, term) * x.of[kLog];
  }
}

// The polynomial whose coefficients, c[0] + c[1] x + ..., stand in column `piece` mod 32.
template <int N>
BQNN_INLINE Float piecewise(Float x, Int piece, const float (&c)[N][32]) {
  return sum_of_terms<N, 0>(powers(x), [&](int i) __attribute__((always_inline)) { return look_up(c[i], piece); });
}

// 2^n for -126 <= n <= 127.
BQNN_INLINE Float power_of_two(Int n) { return as_float((n + 127) << 23); }

// 2^n of kIntegers + n, whose lowest bits are those of n.
BQNN_INLINE Float power_of_two_of(Float shifted) { return as_float((as_int(shifted) << 23) + 0x3F800000); }

constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;  // n * kLn2High is exact for |n| < 2^11

// exp(r) for |r| <= log(2) / 2.
BQNN_INLINE Float exp_reduced(Float r) {
  constexpr float kExp[] = {0.5f, 0.16666512f, 0.041666187f, 0.008369599f, 0.0013951717f};
  return 1.0f + (r + r * r * polynomial(r, kExp));
}

// exp(x + small), |small| < 0.1; the sum is not rounded, so that the argument can be more precise than a float.
BQNN_INLINE Float exp_sum(Float x, Float small) {
  // Beyond, the result is 0 or infinity all the same.
  x = clamp(x, -110.0f, 100.0f);
  const Float n = round(x * 1.44269504f);
  const Float y = exp_reduced(((x - n * kLn2High) - n * kLn2Low) + small);
  // Two factors, since 2^n may be infinite or denormal where the product is not.
  const Int whole = to_int(n), half = whole >> 1;
  return y * power_of_two(half) * power_of_two(whole - half);
}

BQNN_INLINE Float exp(Float x) { return exp_sum(x, Float{}); }

// exp(x + small) for -87 <= x <= 88 or NaN, |small| < 0.1: half as many operations around the polynomial.
BQNN_INLINE Float exp_in_range(Float x, Float small) {
  const Float shifted = x * 1.44269504f + kIntegers, n = shifted - kIntegers;
  return exp_reduced(((x - n * kLn2High) - n * kLn2Low) + small) * power_of_two_of(shifted);
}

// 2^x for -126 <= x <= 127 or NaN.
BQNN_INLINE Float exp2_in_range(Float x) {
  const Float shifted = x + kIntegers, n = shifted - kIntegers;
  return exp_reduced((x - n) * 0.693147181f) * power_of_two_of(shifted);
}

// log(x 2^exponent) for x that is positive, finite and no denormal number.
BQNN_INLINE Float log_in_range(Float x, Int exponent = Int{}) {
  constexpr float kLog[] = {0.3333333f,  -0.25000823f, 0.20001227f, -0.16623357f,
                            0.14201762f, -0.13160194f, 0.1276155f,  -0.0763443f};
  // The mantissa in [sqrt(1/2), sqrt(2)), and what is left as a power of two.
  const Int shifted = as_int(x) - 0x3F3504F3;
  const Float n = to_float((shifted >> 23) + exponent);
  const Float f = as_float((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const Float square = f * f;
  return f + (f * square * polynomial(f, kLog) - 0.5f * square + n * kLn2Low) + n * kLn2High;
}

// log(0) = -inf, NaN for negative numbers.
BQNN_INLINE Float log(Float x) {
  const Mask denormal = x < 0x1p-126f;
  const Float y = log_in_range(select(denormal, x * 0x1p23f, x), denormal & -23);
  const Float limit = select(x == 0.0f, broadcast(-__builtin_inff()), broadcast(__builtin_nanf("")));
  return select(x > 0.0f, select(x < __builtin_inff(), y, x), limit);
}

// log(1 + x), precise near 0 as well.
BQNN_INLINE Float log1p(Float x) {
  const Float u = 1.0f + x;
  // What rounding 1 + x lost, to first order.
  const Float lost = select(x > 1.0f, 1.0f - (u - x), x - (u - 1.0f));
  const Float y = log(u) + lost / u;
  return select((u > 0.0f) & (u < __builtin_inff()), y, log(u));
}

BQNN_INLINE Float sigmoid(Float x) { return 1.0f / (1.0f + exp(-x)); }

// sin and cos of `turns` full turns, 0 <= turns <= 1: an angle in turns is reduced without a rounding.
BQNN_INLINE void sincos_turns(Float turns, Float* sin, Float* cos) {
  constexpr float kSin[] = {6.2831855f, -41.341663f, 81.592354f, -75.39356f};
  constexpr float kCos[] = {1.0f, -19.739208f, 64.93932f, -85.44374f, 59.24596f};
  const Float quarter = round(turns * 4.0f);
  const Float r = turns - quarter * 0.25f, square = r * r;
  const Float s = r * polynomial(square, kSin), c = polynomial(square, kCos);
  const Int q = to_int(quarter);
  const Mask odd = (q & 1) != 0;
  // A quarter turn takes (sin, cos) to (cos, -sin).
  *sin = as_float(as_int(select(odd, c, s)) ^ ((q & 2) << 30));
  *cos = as_float(as_int(select(odd, s, c)) ^ (((q + 1) & 2) << 30));
}

// exp(x^2) erfc(x) for x >= 0.
BQNN_INLINE Float scaled_erfc(Float x) {
  // (x + 2) exp(x^2) erfc(x) as a polynomial in (x - 2) / (x + 2).
  constexpr float kTail[] = {1.0215827f,    -0.68716073f,  0.27947184f,    -0.036441553f, -0.021506527f, 0.0064736814f,
                             0.0030652015f, -0.000824146f, -0.0005931479f, 3.7403628e-05f, 6.46158e-05f};
  const Float inverse = 1.0f / (x + 2.0f);
  return polynomial((x - 2.0f) * inverse, kTail) * inverse;
}

// exp(-scale x^2) for 0 <= x <= 15 and a scale of 1 or 1/2; as precise as exp is, since x^2 is not rounded. In range means
// that the result is no denormal number.
template <bool in_range = false>
BQNN_INLINE Float exp_minus_square(Float x, float scale) {
  const Float head = as_float(as_int(x) & ~0xFFF);  // 12 bits: its square is exact
  const Float high = -scale * head * head, low = -scale * ((x - head) * (x + head));
  return in_range ? exp_in_range(high, low) : exp_sum(high, low);
}

// The complementary error function; keeps its relative precision where it goes to 0.
BQNN_INLINE Float erfc(Float x) {
  const Float a = min(broadcast(15.0f), abs(x));
  const Float tail = exp_minus_square(a, 1.0f) * scaled_erfc(a);
  return select(x < 0.0f, 2.0f - tail, tail);
}

// The standard normal distribution at z, |z| <= 13: P(Z <= z), P(Z > z), both with their relative precision, and the
// density.
struct Normal {
  Float below, above, density;
};

BQNN_INLINE Normal normal(Float z) {
  const Float a = abs(z), gauss = exp_minus_square<true>(a, 0.5f);
  const Float tail = 0.5f * gauss * scaled_erfc(a * 0.70710678f), rest = 1.0f - tail;
  const Mask negative = z < 0.0f;
  return {select(negative, tail, rest), select(negative, rest, tail), 0.39894228f * gauss};
}
