#include "cpu/base/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bqnn {
namespace {

constexpr const char* kNames[kIsas] = {"scalar", "avx2", "avx512", "amx"};

#if defined(__x86_64__)

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: the register states that the operating system saves.
unsigned long long saved_states() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool has(unsigned word, int bit) { return (word >> bit) & 1u; }

bool may_use_tiles() {
#if defined(__linux__)
  // Linux hands out the 8 KiB of tile state on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa probe() {
  constexpr unsigned long long kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf71 = cpuid(7, 1);
  const bool os_saves = has(leaf1.ecx, 27);  // OSXSAVE
  const unsigned long long states = os_saves ? saved_states() : 0;
  const bool avx2 = has(leaf1.ecx, 12) && has(leaf1.ecx, 29) && has(leaf7.ebx, 5);  // FMA, F16C, AVX2
  if (!avx2 || (states & kYmm) != kYmm) return Isa::scalar;
  const bool avx512 = has(leaf7.ebx, 16) && has(leaf7.ebx, 17) && has(leaf7.ebx, 30) &&
                      has(leaf7.ebx, 31)                                                 // F DQ BW VL
                      && has(leaf7.ecx, 1) && has(leaf7.ecx, 11) && has(leaf71.eax, 5);  // VBMI, VNNI, BF16
  if (!avx512 || (states & kZmm) != kZmm) return Isa::avx2;
#if defined(BQNN_EMULATE_TILES)
  return Isa::amx;
#endif
  const bool amx = has(leaf7.edx, 22) && has(leaf7.edx, 24) && has(leaf7.edx, 25);  // bf16, tile, int8
  if (!amx || (states & kTiles) != kTiles || !may_use_tiles()) return Isa::avx512;
  return Isa::amx;
}

#else

Isa probe() { return Isa::scalar; }

#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa best = probe();
  return best;
}

bool chosen_isa(Isa* isa, const char** error) {
  static char message[160];
  *isa = best_isa();
  const char* asked = std::getenv("BQNN_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return true;
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(asked, kNames[i]) != 0) continue;
    if (i <= static_cast<int>(*isa)) {
      *isa = static_cast<Isa>(i);
      return true;
    }
    std::snprintf(message, sizeof message, "BQNN_CPU_ISA is %s, and this machine has %s at most", asked,
                  isa_name(*isa));
    *error = message;
    return false;
  }
  std::snprintf(message, sizeof message, "BQNN_CPU_ISA must be scalar, avx2, avx512 or amx, got %.40s", asked);
  *error = message;
  return false;
}

}  // namespace bqnn
