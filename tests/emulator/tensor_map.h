// What the emulator keeps in the 128 bytes of a CUtensorMap.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstring>

namespace flashmoe::emulator {

struct TensorMap {
  void* base;
  uint64_t sizes[5];    // elements
  uint64_t strides[5];  // bytes; [0] is the element's
  uint16_t box[5];
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t is_swizzled;  // 128 bytes
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline const TensorMap& read_map(const CUtensorMap* map) {
  return *reinterpret_cast<const TensorMap*>(map);
}

}  // namespace flashmoe::emulator
