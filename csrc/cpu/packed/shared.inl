// What the vector and the tile kernels share: how much work repays a thread, views, the rule of "int8".

// Products of two numbers that repay waking a thread.
constexpr int64_t kTaskWork = int64_t{1} << 20;

// Calls f with the elements of a view, as a pointer to what they are.
template <class F>
inline auto with_elements(const View& view, const F& f) {
  if (view.dtype == Dtype::bfloat16) return f(static_cast<Bfloat16*>(view.data) + view.offset);
  return f(static_cast<float*>(view.data) + view.offset);
}

// The rule of "int8", as the Python reference has it: q = rint((x * lift) * factor), which is x / scale.
struct RowScale {
  float lift, factor, scale;
};

inline RowScale row_scale(float largest) {
  const bool small = largest < 0x1p-64f;
  if (!(largest < __builtin_inff())) return {0.0f, 0.0f, __builtin_nanf("")};
  const float lift = small ? 0x1p64f : 1.0f;
  return {lift, largest > 0.0f ? 127.0f / (largest * lift) : 0.0f, largest / 127.0f};
}

// Brings the next images towards the core while the present ones are multiplied: a slice with every few.
struct Ahead {
  const char *at, *end;
  int64_t slice;

  void fetch() {
    for (const char* stop = at + slice < end ? at + slice : end; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// The images [first, first + count) in so many slices.
inline Ahead ahead_of(const PackedCall& call, int64_t first, int64_t count, int64_t slices) {
  const int64_t size = call.x.dtype == Dtype::bfloat16 ? 2 : 4;
  const char* at = static_cast<const char*>(call.x.data) + (call.x.offset + first * call.x.image_stride) * size;
  const int64_t bytes = count * call.x.image_stride * size;
  return {at, at + bytes, 64 + bytes / slices};
}
