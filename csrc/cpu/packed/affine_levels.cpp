#include "cpu/packed/affine_levels.h"

#include <cmath>
#include <cstring>

namespace bqnn {
namespace {

// The steps are searched among ratios of numbers of 8 bits: two of the three are taken as given, the third is the
// bfloat16 number next to where it has to be, which is off by some 2^-10 of itself. What is allowed is the rounding of
// the levels, 2^-25 of each, so that one pair in 2^14 or so is right. Powers of two down to kSmallest make 2^19 pairs.
constexpr int kSmallest = -8;
constexpr double kLeastSpan = 0.5;  // the outer steps are so far apart at least
// What is added for a level is at most so many times the level: the errors of sums stay in proportion to their terms.
constexpr double kMostCancelled = 16.0;

double round_to_bf16(double value) {
  const float nearest = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

// How far a number may be from a level and still be rounded to it.
double half_unit(float level) {
  if (level == 0.0f) return 0.0;
  int exponent;
  std::frexp(level, &exponent);
  return std::ldexp(1.0, exponent - 25);
}

// The top 40 bits: a product with a step is exact.
double shorten(double value) {
  int exponent;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 40)), exponent - 40);
}

bool gives_levels(const float* levels, int num_levels, const AffineLevels& affine) {
  for (int m = 0; m < num_levels; ++m) {
    const double scaled = affine.scale * affine.step[m];
    if (static_cast<float>(affine.offset + scaled) != levels[m]) return false;
    if (std::fabs(affine.offset) + std::fabs(scaled) > kMostCancelled * std::fabs(levels[m])) return false;
  }
  return true;
}

class ThreeLevels {
 public:
  ThreeLevels(const float* levels, AffineLevels* found) : levels_(levels), found_(found) {
    for (int m = 0; m < 3; ++m) half_[m] = half_unit(levels[m]);
    span_ = static_cast<double>(levels[2]) - levels[0];
    share_ = (static_cast<double>(levels[1]) - levels[0]) / span_;
    slack_ = (half_[1] + (1.0 - share_) * half_[0] + share_ * half_[2]) / span_;
    for (int m = 1; m < 3; ++m)
      if (std::fabs(levels[m]) < std::fabs(levels[smallest_])) smallest_ = m;
  }

  bool search() const {
    for (int exponent = 0; exponent >= kSmallest; --exponent)
      for (int i = 128; i < 256; ++i)
        for (int j = 128; j < 256; ++j) {
          const double large = i / 128.0, small = std::ldexp(j / 128.0, exponent);
          if (try_pair(-large, small) || try_pair(-small, large)) return true;
          if (large - small >= kLeastSpan && (try_pair(-large, -small) || try_pair(small, large))) return true;
        }
    return false;
  }

 private:
  // The steps of the lowest and the highest level.
  bool try_pair(double low, double high) const {
    const double wanted = low + share_ * (high - low), middle = round_to_bf16(wanted);
    const double off = (middle - wanted) / (high - low);
    if (std::fabs(off) >= slack_) return false;
    // All three levels give way to each other in proportion to what they may.
    const double moved = off / slack_;
    const double move[3] = {-moved * half_[0], moved * half_[1], -moved * half_[2]};
    AffineLevels affine{0.0, shorten((span_ + move[2] - move[0]) / (high - low)),
                        {static_cast<float>(low), static_cast<float>(middle), static_cast<float>(high)}};
    // Exact at the level that is nearest to zero, where a unit is least.
    affine.offset = levels_[smallest_] + move[smallest_] - affine.scale * affine.step[smallest_];
    if (!gives_levels(levels_, 3, affine)) return false;
    *found_ = affine;
    return true;
  }

  const float* levels_;
  AffineLevels* found_;
  double half_[3], span_, share_, slack_;
  int smallest_ = 0;
};

}  // namespace

bool find_affine(const float* levels, int num_levels, AffineLevels* found) {
  if (num_levels == 3) return ThreeLevels(levels, found).search();
  if (num_levels != 2) return false;
  const double low = levels[0], high = levels[1];
  *found = std::fabs(low) < std::fabs(high) ? AffineLevels{low, high - low, {0.0f, 1.0f, 0.0f}}
                                            : AffineLevels{high, high - low, {-1.0f, 0.0f, 0.0f}};
  return gives_levels(levels, 2, *found);
}

}  // namespace bqnn
