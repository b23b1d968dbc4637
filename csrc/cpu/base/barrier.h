// Where threads that run one program together wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bqnn {

class Barrier {
 public:
  explicit Barrier(int64_t members) : members_(members) {}

  // Returns when all members have come, or false where one never will; a thread may come for several members. What they
  // wrote before they came is seen by all.
  bool wait(int64_t members = 1) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (come_.fetch_add(members, std::memory_order_acq_rel) + members == members_) {
      come_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return !broken_.load(std::memory_order_acquire);
    }
    for (int turns = 0; round_.load(std::memory_order_acquire) == round;) {
      if (broken_.load(std::memory_order_acquire)) return false;
      // Steps take microseconds. Where more threads than processors wait, the others would never have their turn.
      if (++turns < kTurns)
        pause();
      else
        std::this_thread::yield();
    }
    return true;
  }

  // Lets everybody go, now and later: a member will not come any more.
  void give_up() { broken_.store(true, std::memory_order_release); }

 private:
  static constexpr int kTurns = 4096;
  const int64_t members_;
  alignas(64) std::atomic<int64_t> come_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<bool> broken_{false};

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
};

}  // namespace bqnn
