// Squares of 32-bit numbers whose rows become columns.

inline __attribute__((always_inline)) void transpose(UInt v[kLanes]) {
  UInt lane = {};
  BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  BQNN_UNROLL(4) for (unsigned side = 1; side < kLanes; side *= 2) {  // of the squares that change places
    const UInt outer = (UInt)((lane & side) != 0 ? lane + (kLanes - side) : lane);
    const UInt inner = (UInt)((lane & side) != 0 ? lane + kLanes : lane + side);
    BQNN_UNROLL(16) for (unsigned i = 0; i < kLanes; ++i) {
      if (i & side) continue;
      const UInt a = v[i], b = v[i + side];
      v[i] = __builtin_shuffle(a, b, outer);
      v[i + side] = __builtin_shuffle(a, b, inner);
    }
  }
}
