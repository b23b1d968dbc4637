// The kernel of assign_codes.

typedef uint8_t Bytes __attribute__((vector_size(BQNN_LANES)));

BQNN_INLINE Bytes codes_of(Float weight, const float* thresholds, int num_thresholds) {
  Int codes = {};
  for (int j = 0; j < num_thresholds; ++j) codes -= weight > thresholds[j];  // a mask is -1
  return __builtin_convertvector(codes, Bytes);
}

static void assign_codes_kernel(const float* weight, int64_t count, const float* thresholds, int num_thresholds,
                                uint8_t* codes) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Bytes bytes = codes_of(load(weight + i), thresholds, num_thresholds);
    __builtin_memcpy(codes + i, &bytes, sizeof bytes);
  }
  if (i == count) return;
  const Bytes bytes = codes_of(load_first(weight + i, static_cast<int>(count - i)), thresholds, num_thresholds);
  for (int lane = 0; i < count; ++i, ++lane) codes[i] = bytes[lane];
}
