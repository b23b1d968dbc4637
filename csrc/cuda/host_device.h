// What lets the arithmetic of a kernel compile for the host too, where tests run it without a GPU.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BQNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BQNN_HOST_DEVICE inline
#endif

namespace bqnn::cuda {

BQNN_HOST_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

BQNN_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Byte i of the result is byte n of the eight bytes of (low, high), n = bits 0 to 2 of nibble i of the selector; where
// bit 3 of the nibble is set, the sign of that byte eight times.
BQNN_HOST_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = (selector >> (4 * i)) & 15;
    const uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    result |= ((nibble & 8) ? ((byte & 128) ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
#endif
}

// (value & mask) ^ flips. The compiler makes two instructions of it where both are constants.
BQNN_HOST_DEVICE uint32_t mask_and_flip(uint32_t value, uint32_t mask, uint32_t flips) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(value), "r"(mask), "r"(flips));
  return result;
#else
  return (value & mask) ^ flips;
#endif
}

// value >> count, 0 <= count < 32, by the multiplier, which decoding leaves idle.
BQNN_HOST_DEVICE uint32_t shift_by_multiplier(uint32_t value, int count) {
#ifdef __CUDA_ARCH__
  uint32_t result = value;
  if (count > 0) asm("mul.hi.u32 %0, %1, %2;" : "=r"(result) : "r"(value), "r"(1u << (32 - count)));
  return result;
#else
  return value >> count;
#endif
}

// Rounded to nearest even, as bfloat16, in a float32.
BQNN_HOST_DEVICE float round_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return value;  // NaN: rounding its bits could make an infinity
  return float_of((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

// The upper halves of two float32, which is where a bfloat16 lies.
BQNN_HOST_DEVICE uint32_t upper_halves(float first, float second) {
  return permute_bytes(bits_of(first), bits_of(second), 0x7632);
}

// What is left of a value after its first bfloat16 part, the value cut to 8 bits. Three such parts are a float32. An
// infinity has no rest: it would be NaN.
BQNN_HOST_DEVICE float rest_of(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : value - float_of(bits & 0xffff0000u);
}

}  // namespace bqnn::cuda
