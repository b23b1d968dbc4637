// The kernel of assign_codes.

typedef uint8_t Bytes __attribute__((vector_size(BQNN_LANES)));

// Codes of kVectors vectors, which share the loads of the thresholds.
template <int kVectors>
BQNN_INLINE void assign_vectors(const Float (&weights)[kVectors], const float* thresholds, int num_thresholds,
                                Bytes (&codes)[kVectors]) {
  Int sums[kVectors] = {};
  for (int j = 0; j < num_thresholds; ++j) {
    const Float threshold = broadcast(thresholds[j]);
    for (int v = 0; v < kVectors; ++v) sums[v] -= weights[v] > threshold;  // a mask is -1
  }
  for (int v = 0; v < kVectors; ++v) codes[v] = __builtin_convertvector(sums[v], Bytes);
}

static void assign_codes_kernel(const float* weight, int64_t count, const float* thresholds, int num_thresholds,
                                uint8_t* codes) {
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
    Float weights[kVectors];
    Bytes bytes[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load(weight + i + v * kLanes);
    assign_vectors(weights, thresholds, num_thresholds, bytes);
    for (int v = 0; v < kVectors; ++v) __builtin_memcpy(codes + i + v * kLanes, &bytes[v], kLanes);
  }
  for (; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const Float weights[1] = {load_first(weight + i, lanes)};
    Bytes bytes[1];
    assign_vectors(weights, thresholds, num_thresholds, bytes);
    for (int lane = 0; lane < lanes; ++lane) codes[i + lane] = bytes[0][lane];
  }
}
