// Where each value lies in memory, and in which order things run: fixed when a program is made.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/engine/graph.h"

namespace bqnn::engine {

// Memory of one or more values: what cat joins lies in one buffer, side by side in each pixel.
struct Buffer {
  Shape shape;
  Dtype dtype;
  int zero = 0;
  int64_t pixel = 0;  // elements from one pixel to the next: its channels, or a few more that nobody writes
  int64_t top = 0, bottom = 0, left = 0, right = 0;  // the border, as wide as the widest convolution that reads it asks
  int first = -1, last = -1;                         // the instructions that use it
  bool shared = false;  // it lives from one stage to another, so that it holds all images
  int64_t offset = 0;   // bytes for each image, before it in the arena
  int64_t divided = 0;  // the same where all threads go through the instructions together

  int64_t row() const { return (left + shape.width + right) * pixel; }
  int64_t image() const { return (top + shape.height + bottom) * row(); }
  int64_t bytes() const { return (image() * size_of(dtype) + 63) / 64 * 64; }
  bool bordered() const { return top + bottom + left + right > 0; }
};

// A value's place: a buffer, from a channel on.
struct Place {
  int buffer = -1;
  int64_t channel = 0;
};

enum class Kind : int32_t { read, write, border, conv2d, depthwise, point, softmax, pool, move };

struct Instruction {
  Kind kind;
  int step = -1;     // of the graph; for read and write the index of the input or output
  int value = -1;    // what is read or written; of a border its buffer
  int source = -1;   // of a copy that cat needs: the value that is copied
  int64_t channel = 0;  // where such a copy goes
  // Whether a thread that has done its rows of the instruction before may go on with the same rows of this one, while
  // others are still at theirs.
  bool joins = false;
};

// Instructions that run together: a thread takes some images through all of them, or, where wide, threads divide the
// channels of a large layer that every image needs whole.
struct Stage {
  int begin, end;
  bool wide;
};

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Place> places;  // of each value
  std::vector<Instruction> instructions;
  std::vector<Stage> stages;
  int64_t local = 0, shared = 0, divided = 0;  // bytes for each image
};

// The plan of a graph that is sound. wide[i]: whether step i is a layer that its own stage suits. aligned: whether the
// pixels that convolutions of integers read begin where a tile of AMX may be loaded at once.
Plan make_plan(const Graph& graph, const std::vector<char>& wide, bool aligned);

// Sets `joins` of a plan's instructions, whose values have their places.
void find_joins(const Graph& graph, Plan* plan);

// Whether a step is a convolution with one channel a group.
bool is_depthwise(const Graph& graph, const Step& step);

}  // namespace bqnn::engine
