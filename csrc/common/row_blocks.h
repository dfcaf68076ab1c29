#pragma once

#include <stdint.h>

namespace ultra {
// Row blocks of a sum over rows: a function of the shape alone (see common/parallel.h).
constexpr int64_t kMostRowBlocks = 16;
inline int64_t row_blocks(int64_t rows) { return rows < 64 ? 1 : (rows < 2048 ? 4 : kMostRowBlocks); }
}  // namespace ultra
