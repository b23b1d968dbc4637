// Few elements, copied or set in pieces: a call of memcpy or memset takes longer than they do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace bqnn {

constexpr int64_t kPieceBytes = 16, kMostPieces = 4;

// Calls f(first element) for pieces that cover `count` elements, one of them at least: the last begins where it is whole.
template <class F>
inline void each_piece(int64_t count, int64_t piece, const F& f) {
  for (int64_t i = 0; i < count - piece; i += piece) f(i);
  f(count - piece);
}

inline void copy_few(char* to, const char* from, int64_t bytes) {
  if (bytes < kPieceBytes || bytes > kMostPieces * kPieceBytes)
    return (void)std::memcpy(to, from, static_cast<size_t>(bytes));
  each_piece(bytes, kPieceBytes, [&](int64_t i) { std::memcpy(to + i, from + i, kPieceBytes); });
}

template <class X>
inline void set_few(X* to, X number, int64_t count) {
  constexpr int64_t kPiece = kPieceBytes / sizeof(X);
  if (count < kPiece || count > kMostPieces * kPiece) return (void)std::fill_n(to, count, number);
  X piece[kPiece];
  std::fill_n(piece, kPiece, number);
  each_piece(count, kPiece, [&](int64_t i) { std::memcpy(to + i, piece, kPieceBytes); });
}

}  // namespace bqnn
