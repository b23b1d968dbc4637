// What a program hands on while it runs.
#pragma once

#include <algorithm>

#include "cpu/engine/program.h"

namespace bqnn::engine {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The memory of a run, or of one thread's part of it.
struct Program::Frame {
  const Outside *inputs, *outputs;
  char *local, *shared;
  int64_t first, images;  // of the batch
  int64_t all;            // images of the batch
  int64_t room;           // images that local memory is for
  bool divided;           // whether local memory is that of threads that go through the instructions together

  // Where the frame's first image of a buffer lies.
  char* memory(const Buffer& b) const {
    if (divided) return local + b.divided * room;
    return b.shared ? shared + b.offset * all + first * b.bytes() : local + b.offset * room;
  }
};

// How threads divide an instruction among them.
struct Program::Division {
  // Each has its rows of all images, or units of another kind; or one thread has everything.
  enum class By { rows, units, nothing } by;
  int64_t threads;    // that have any
  int64_t units;      // of all of them
  int64_t parts = 1;  // of the positions of a convolution
  decltype(Kernels::conv2d) conv2d = nullptr;

  int64_t first(int64_t member) const { return units * std::min(member, threads) / threads; }
};

// Vectors of a strip that a convolution has channels for.
inline int64_t vectors_of(const Conv& conv, const Kernels& kernels) {
  return ceil_div(std::min<int64_t>(conv.group_channels, kernels.strip), kernels.lanes);
}

}  // namespace bqnn::engine
