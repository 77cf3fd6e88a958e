// Shared-memory descriptors of the matrix product's operands, 128-byte swizzle.
#pragma once

#include "cuda/config/grouped_product.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::tile {

// Groups of 8 rows of 128 bytes are 1024 bytes apart. K-major: a row is 64 k of one m or n.
// M- or N-major: a row is 64 m or n of one k; the leading offset, kLeading bytes, leads to the next
// 64 n (one product takes 64 m).
template <uint64_t kLeading = 8192>
FM_DEVICE uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupOffset = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kLeadingOffset = (kLeading >> 4) << 16;
  return kSwizzle128 | kGroupOffset | kLeadingOffset | ((address & 0x3FFFF) >> 4);
}

// Descriptor increments (16-byte units) from one product's 16 k to the next.
inline constexpr int kDepthMajorStep = 16 * config::kElementBytes >> 4;
inline constexpr int kColumnMajorStep = 16 * 128 >> 4;
// From the first 64 weight rows to the second, either major.
inline constexpr int kHalfStep =
    config::kHalfRows * config::kDepthStep * config::kElementBytes >> 4;

}  // namespace flashmoe::cuda::tile
