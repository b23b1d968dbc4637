// Working memory that a thread keeps from call to call: allocated once, grown when a larger problem comes.
#pragma once

#include <cstddef>

namespace bqnn {

enum class Scratch { activations, scales, row_scales, panel, products, tables, positions, offsets, sums, arena, shared, count };

// At least `bytes` of memory aligned to 64, for this thread and purpose; its contents are whatever was there: what the
// thread has left there, if it asked for as many bytes before. It stays valid until the same thread asks for the same
// purpose again.
char* scratch(Scratch purpose, size_t bytes);

}  // namespace bqnn
