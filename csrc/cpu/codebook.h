// The bound on what a codebook holds.
#pragma once

namespace bqnn {

constexpr int kMaxLevels = 16;

}  // namespace bqnn
