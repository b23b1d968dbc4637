// assign_codes: the code #{j : w > t_j} of every weight, as a byte each or as base-M digits (bqnn/packing.py).
#pragma once

#include <cstdint>

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"

namespace bqnn {

struct AssignCodes {
  const float* weight;      // [rows, columns], contiguous
  const float* thresholds;  // [rows or 1, num_levels - 1], increasing
  int64_t rows, columns;
  bool per_row;    // whether each row has a codebook of its own
  int num_levels;  // 2..16
};

// codes: [rows, columns].
void assign_codes(const Parallel& parallel, Isa isa, const AssignCodes& weights, uint8_t* codes);

// packed: [rows, width], width = ceil(columns / digits), with `digits` codes in a byte and M^digits <= 256.
void assign_codes_packed(const Parallel& parallel, Isa isa, const AssignCodes& weights, uint8_t* packed);

// The kernel: the codes of `count` weights that share thresholds, [num_thresholds].
using AssignCodesKernel = void (*)(const float* weight, int64_t count, const float* thresholds, int num_thresholds,
                                   uint8_t* codes);

}  // namespace bqnn
