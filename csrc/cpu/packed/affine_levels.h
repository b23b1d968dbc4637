// Levels as offset + scale * step, each step one bfloat16 number: x . w is then offset * sum(x) + scale * (x . steps),
// and a step is one operand of a tile product where a level itself is three.
#pragma once

#include <cstdint>

namespace bqnn {

struct AffineLevels {
  double offset, scale;
  float step[3];  // below 2 in magnitude
};

// Whether 2 or 3 increasing levels are affine in bfloat16 steps, bit for bit: offset + scale * step[m] in double,
// rounded to float, is levels[m]. Two always are, three nearly always.
bool find_affine(const float* levels, int num_levels, AffineLevels* found);

}  // namespace bqnn
