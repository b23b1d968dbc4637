#include "cpu/base/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace bqnn {
namespace {

// With AddressSanitizer memory ends where it was asked for to end, so that what goes beyond is seen.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

struct Buffer {
  char* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

char* scratch(Scratch purpose, size_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  const size_t unit = kExact ? 64 : 4096, rounded = (bytes + (kExact ? 0 : bytes / 4) + unit - 1) / unit * unit;
  if (kExact ? buffer.bytes != rounded : buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer = Buffer{};
    buffer.data = static_cast<char*>(std::aligned_alloc(unit, rounded));
    if (buffer.data == nullptr) throw std::bad_alloc();
    // Kernels read, and multiply by zero, elements beyond the last one: they must be finite from the start.
    std::memset(buffer.data, 0, rounded);
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace bqnn
