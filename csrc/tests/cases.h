// What the programs that draw cases share: random numbers, sizes, buffers with guards, threads, the loop over cases.
//
// A case is a function of the seed and its number alone, so that a failing one can be run again by its number.
#pragma once

#if !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"

// Read by the sanitizers' libraries: abort, so that the case is printed.
extern "C" [[gnu::used]] inline const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" [[gnu::used]] inline const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace bqnn::cases {

// SplitMix64: the same numbers with every compiler and library.
class Random {
 public:
  Random(uint64_t seed, uint64_t number) : state_(seed) { state_ = next() + number, state_ = next(); }

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  // An integer in [low, high].
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() { return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(6.283185307179586 * uniform()); }

  // A size in [1, limit]: often one at the edge of a vector or a tile, often a small one.
  int64_t size(int64_t limit) {
    static constexpr int64_t kEdges[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129};
    if (chance(35)) {
      const int64_t edge = kEdges[between(0, sizeof kEdges / sizeof *kEdges - 1)];
      if (edge <= limit) return edge;
    }
    return between(1, chance(40) && limit > 20 ? 20 : limit);
  }

  template <class T, size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[between(0, n - 1)];
  }

 private:
  uint64_t state_;
};

// `count` elements, all bytes 0xFF at first, which is NaN. A read or write beyond them is seen by AddressSanitizer;
// without it they end where a page ends that nobody may touch, so that no instruction can hide one from us, and what
// lies before them has to stay as it is.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    if (count == 0) return;  // an empty tensor may have no memory
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#if defined(__SANITIZE_ADDRESS__)
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    memory_ = static_cast<unsigned char*>(memory);
    begin_ = 0;
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    memory_ = static_cast<unsigned char*>(memory);
    if (mprotect(memory_ + inside, page, PROT_NONE) != 0) std::abort();
    begin_ = inside - bytes;
#endif
    std::memset(memory_, 0xFF, begin_ + bytes);
  }
#if defined(__SANITIZE_ADDRESS__)
  ~Buffer() { std::free(memory_); }
#else
  ~Buffer() { if (memory_) munmap(memory_, mapped_); }
#endif
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return memory_ ? reinterpret_cast<T*>(memory_ + begin_) : nullptr; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data()[i]; }

  bool equals(const Buffer& other) const {
    return count_ == other.count_ && (count_ == 0 || std::memcmp(data(), other.data(), count_ * sizeof(T)) == 0);
  }
  // Whether nothing was written before the elements.
  bool intact() const {
    return std::all_of(memory_, memory_ + begin_, [](unsigned char byte) { return byte == 0xFF; });
  }

 private:
  int64_t count_;
  unsigned char* memory_ = nullptr;
  size_t begin_ = 0, mapped_ = 0;
};

// New threads in each call, which find their scratch memory empty.
inline Parallel std_threads(int threads) {
  static int count;
  count = threads;
  const auto run = [](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    int64_t length = (n + count - 1) / count;
    if (length < grain) length = grain;
    std::vector<std::thread> others;
    for (int64_t begin = length; begin < n; begin += length) {
      others.emplace_back(body, begin, begin + length < n ? begin + length : n, context);
    }
    body(0, length < n ? length : n, context);
    for (std::thread& other : others) other.join();
  };
  return {run, threads};
}

// The instruction sets of this machine, up to the one that BQNN_CPU_ISA names; scalar first.
inline std::vector<Isa> isas() {
  Isa best;
  const char* error = nullptr;
  if (!chosen_isa(&best, &error)) {
    std::fprintf(stderr, "%s\n", error);
    std::exit(2);
  }
  std::vector<Isa> found;
  for (int i = 0; i <= static_cast<int>(best); ++i) found.push_back(static_cast<Isa>(i));
  return found;
}

// How to run the current case again; printed when it fails or dies.
inline char repeat[200];

inline void print_repeat() {
  std::fprintf(stdout, "repeat: %s\n", repeat);
  std::fflush(stdout);
}

inline void print_repeat_at_death() {
#if defined(__SANITIZE_ADDRESS__)
  constexpr int kSignals[] = {SIGABRT};  // the sanitizer handles the other signals, then aborts
#else
  constexpr int kSignals[] = {SIGSEGV, SIGFPE, SIGILL, SIGABRT, SIGBUS};
#endif
  for (const int signal : kSignals) {
    std::signal(signal, [](int number) {
      std::signal(number, SIG_DFL);
      print_repeat();  // not for signal handlers, but the process is lost anyway
      std::raise(number);
    });
  }
}

// Calls `run(seed, number)` for each case; it returns what is wrong with the case, or nothing. Stops at the first that
// is wrong. Returns the exit status; `closing()` ends the line that is printed. Options, each with a number:
//
//     --cases N      how many
//     --seed S       other cases
//     --only N       this one alone
//     --failures N   goes on until so many are wrong
template <class Run, class Closing>
int run_cases(int argc, char** argv, int64_t cases, const Run& run, const Closing& closing) {
  uint64_t seed = 20230831;
  int64_t first = 0, failures = 0, most_failures = 1;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    char* end = nullptr;
    const long long value = i + 1 < argc ? std::strtoll(argv[i + 1], &end, 10) : 0;
    const bool number = end != nullptr && *end == '\0' && end != argv[i + 1];
    if (number && option == "--cases") {
      cases = value;
    } else if (number && option == "--seed") {
      seed = static_cast<uint64_t>(value);
    } else if (number && option == "--only") {
      first = value, cases = value + 1;
    } else if (number && option == "--failures") {
      most_failures = value;
    } else {
      std::fprintf(stderr, "usage: %s [--cases N] [--seed S] [--only N] [--failures N]\n", argv[0]);
      return 2;
    }
  }
  print_repeat_at_death();
  const auto start = std::chrono::steady_clock::now();
  for (int64_t number = first; number < cases; ++number) {
    std::snprintf(repeat, sizeof repeat, "%s --seed %llu --only %lld", argv[0], static_cast<unsigned long long>(seed),
                  static_cast<long long>(number));
    const std::string wrong = run(seed, static_cast<uint64_t>(number));
    if (wrong.empty()) continue;
    std::printf("case %lld: %s\n", static_cast<long long>(number), wrong.c_str());
    print_repeat();
    if (++failures >= most_failures) return 1;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::string end = failures ? "; wrong: " + std::to_string(failures) : closing();
  std::printf("%lld cases, %.1f s%s\n", static_cast<long long>(cases - first), seconds, end.c_str());
  return failures ? 1 : 0;
}

}  // namespace bqnn::cases
