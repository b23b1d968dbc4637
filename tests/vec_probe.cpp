// csrc/cpu/simd/vec.inl as a shared library, for test_vec.py: each function of it over an array.
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {
#include "cpu/simd/vec.inl"

Float sin_turns(Float x) {
  Float s, c;
  sincos_turns(x, &s, &c);
  return s;
}

Float cos_turns(Float x) {
  Float s, c;
  sincos_turns(x, &s, &c);
  return c;
}

Float normal_below(Float x) { return normal(x).below; }
Float normal_above(Float x) { return normal(x).above; }
Float normal_density(Float x) { return normal(x).density; }

}  // namespace

#define PROBE(name)                                                                     \
  extern "C" void probe_##name(const float* x, float* y, int64_t n) {                   \
    for (int64_t i = 0; i < n; i += kLanes) {                                           \
      const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;              \
      store_first(y + i, name(load_first(x + i, lanes)), lanes);                        \
    }                                                                                   \
  }

PROBE(exp)
PROBE(log)
PROBE(log1p)
PROBE(sqrt)
PROBE(sigmoid)
PROBE(erfc)
PROBE(sin_turns)
PROBE(cos_turns)
PROBE(normal_below)
PROBE(normal_above)
PROBE(normal_density)
