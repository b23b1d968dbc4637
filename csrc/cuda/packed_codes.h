// From a word of codes to pairs of bfloat16 levels, in registers: the operand of a tensor-core product.
//
// A lane decodes four rows at once, so what counts is instructions a weight. One byte permutation looks up four bytes
// among eight; it needs its four indices as nibbles, which is what decides here which codes make a pair. Activations
// are brought into the same order when they are staged, once for many rows of the weight.
//
//     capacity 2    1 bit a code: no table. A bit becomes the sign of 1.0, and the levels come in at the end.
//     capacity 4    2 bits: low and high bytes of the 4 levels, a pair of levels a permutation.
//     capacity 8    4 bits, M <= 8: four codes' low bytes, their high bytes, and two permutations that join them.
//     capacity 16   4 bits: likewise in both halves of the table, then the half that bit 3 of the code chooses.
#pragma once

#include "cuda/host_device.h"

namespace bqnn::cuda {

// Capacity is the number of levels that a decoder has room for: 2, 4, 8 or 16.
template <int kCapacity>
struct Codes {
  static_assert(kCapacity == 2 || kCapacity == 4 || kCapacity == 8 || kCapacity == 16);
  static constexpr int kBits = kCapacity == 2 ? 1 : kCapacity == 4 ? 2 : 4;
  static constexpr int kInWord = 32 / kBits;
  static constexpr int kPairs = kInWord / 2;                // registers that a word becomes
  static constexpr int kQuads = kPairs / 4;                 // groups of four registers, enough for two products
  static constexpr int kInLoad = 4 * kInWord;               // codes in 16 bytes
  static constexpr int kInStep = 4 * kInLoad;               // codes of one row that four lanes load
  static constexpr int kTable = kCapacity == 2 ? 0 : kCapacity / 2;  // its words: low bytes of the levels, then high bytes

  // Which code of a word is in half 0 (low) or 1 of pair 0..kPairs-1.
  static constexpr BQNN_HOST_DEVICE int code_at(int pair, int half) {
    if (kCapacity == 2) return pair + 16 * half;
    if (kCapacity == 4) return pair / 2 + 8 * (pair % 2) + 4 * half;
    return 2 * pair + half;
  }

  // Pairs 4 quad .. 4 quad + 3 of a word. With capacity 2 a pair is of 1 - 2 code instead of levels.
  static BQNN_HOST_DEVICE void decode(uint32_t word, int quad, const uint32_t* table, uint32_t* pairs) {
    if constexpr (kCapacity == 2) {
      for (int i = 0; i < 4; ++i) pairs[i] = mask_and_flip(word << (15 - 4 * quad - i), 0x80008000u, 0x3f803f80u);
    } else if constexpr (kCapacity == 4) {
      for (int i = 0; i < 2; ++i) {
        // A code a byte, then twice as nibbles: the index of its low byte and, 4 more, that of its high byte.
        const uint32_t codes = shift_by_multiplier(word, 4 * quad + 2 * i) & 0x03030303u;
        const uint32_t select = codes * 0x11u + 0x40404040u;
        pairs[2 * i] = permute_bytes(table[0], table[1], select);
        pairs[2 * i + 1] = permute_bytes(table[0], table[1], select >> 16);
      }
    } else {
      const uint32_t mask = kCapacity == 8 ? word : word & 0x77777777u;
      const uint32_t shifted = word << 4;
      for (int i = 0; i < 2; ++i) {
        const uint32_t select = i == 0 ? mask : mask >> 16;
        uint32_t low = permute_bytes(table[0], table[1], select);
        uint32_t high;
        if constexpr (kCapacity == 8) {
          high = permute_bytes(table[2], table[3], select);
        } else {
          // Bit 3 of each of four codes, eight times: the signs of bytes of the word and of the word shifted.
          const uint32_t upper = permute_bytes(shifted, word, i == 0 ? 0xd9c8 : 0xfbea);
          low = (low & ~upper) | (permute_bytes(table[2], table[3], select) & upper);
          high = permute_bytes(table[4], table[5], select);
          high = (high & ~upper) | (permute_bytes(table[6], table[7], select) & upper);
        }
        pairs[2 * i] = permute_bytes(low, high, 0x5140);
        pairs[2 * i + 1] = permute_bytes(low, high, 0x7362);
      }
    }
  }
};

// Level `code` of a codebook in parts of bfloat16, as bytes into tables of 2 * capacity bytes, one table a part.
template <int kCapacity, int kParts>
BQNN_HOST_DEVICE void write_level(float level, int code, uint8_t* tables) {
  for (int part = 0; part < kParts; ++part) {
    const uint32_t bits = bits_of(level) >> 16;
    tables[2 * kCapacity * part + code] = static_cast<uint8_t>(bits);
    tables[2 * kCapacity * part + kCapacity + code] = static_cast<uint8_t>(bits >> 8);
    level = rest_of(level);
  }
}

}  // namespace bqnn::cuda
