// Elements that are float or bfloat16.

BQNN_INLINE Float load_elements(const Elements& from, int64_t i, int count) {
  if (from.bfloat16) return load_bfloat16_first(static_cast<const uint16_t*>(from.data) + i, count);
  return load_first(static_cast<const float*>(from.data) + i, count);
}

BQNN_INLINE void store_elements(const Elements& to, int64_t i, Float x, int count) {
  if (to.bfloat16) return store_bfloat16_first(static_cast<uint16_t*>(to.data) + i, x, count);
  store_first(static_cast<float*>(to.data) + i, x, count);
}
