// Threads, without knowing whose: the bindings hand in torch's, a test its own.
#pragma once

#include <cstdint>

namespace bqnn {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on ranges that cover [0, n), each of at least `grain` (but the last), perhaps from several threads.
  void (*run)(int64_t n, int64_t grain, Body body, void* context);
  int threads;
};

template <class F>
inline void parallel_for(const Parallel& parallel, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (parallel.threads <= 1 || n <= grain) return f(int64_t{0}, n);
  parallel.run(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace bqnn
