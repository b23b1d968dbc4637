// The last vector of a row or a block, which may not be whole, and sums over a block.

BQNN_INLINE int lanes_left(int64_t left) { return left < kLanes ? (int)left : kLanes; }

BQNN_INLINE Mask first_lanes(int count) {
  Int index = {};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index < count;
}

// The sum of each lane over a block, in 16 of them whatever the vectors' length, so that all instruction sets agree.
struct LaneSums {
  alignas(64) float lane[16] = {};

  // The vector that starts at the block's element `from`, of which only the lanes below `count` count.
  BQNN_INLINE void add(int64_t from, Float x) {
    float* p = lane + from % 16;
    store(p, load(p) + x);
  }

  BQNN_INLINE double total() const {
    double sum = 0.0;
    for (int i = 0; i < 16; ++i) sum += lane[i];
    return sum;
  }
};
