#include "cpu/base/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace bqnn {
namespace {

struct Buffer {
  char* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

char* scratch(Scratch purpose, size_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer = Buffer{};
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = static_cast<char*>(std::aligned_alloc(4096, rounded));
    if (buffer.data == nullptr) throw std::bad_alloc();
    // Kernels read, and multiply by zero, elements beyond the last one: they must be finite from the start.
    std::memset(buffer.data, 0, rounded);
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace bqnn
