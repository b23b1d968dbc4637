// What the vector and the tile kernels share: the rule of "int8", ReLU, and codes as compile-time constants.
//
// Included inside the namespace of a translation unit that has set the target.
#pragma once

// The rule of "int8", as in bqnn/ops/_int8.py: q = rint((x * lift) * factor), which is x / scale.
struct RowScale {
  float lift, factor, scale;
};

inline RowScale row_scale(float largest) {
  const bool small = largest < 0x1p-64f;
  if (!(largest < __builtin_inff())) return {0.0f, 0.0f, __builtin_nanf("")};
  const float lift = small ? 0x1p64f : 1.0f;
  return {lift, largest > 0.0f ? 127.0f / (largest * lift) : 0.0f, largest / 127.0f};
}

// What smaller outputs become: `value < least ? least : value` is one instruction, and leaves NaN and -0.0 as torch's ReLU
// does, or every number where there is none.
inline float least_output(bool relu) { return relu ? 0.0f : -__builtin_inff(); }

// std::integral_constant without the header.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(bits, shared) with both as compile-time constants.
template <class F>
inline void with_codes_of(const PackedLayout& layout, const F& f) {
  const auto with_bits = [&](auto shared) {
    if (layout.bits == 1) return f(Constant<1>{}, shared);
    if (layout.bits == 2) return f(Constant<2>{}, shared);
    return f(Constant<4>{}, shared);
  };
  if (layout.codebooks == 1) return with_bits(Constant<1>{});
  return with_bits(Constant<0>{});
}

// Brings the next images towards the core while the present ones are multiplied: a slice with every few.
struct Ahead {
  const char *at, *end;
  int64_t slice;

  void fetch() {
    for (const char* stop = at + slice < end ? at + slice : end; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};
