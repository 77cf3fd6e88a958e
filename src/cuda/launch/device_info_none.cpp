#include <cstdio>

#include "cuda/launch/device_info.h"

namespace flashmoe::cuda {

int device_info(char* text, std::size_t capacity) {
  std::snprintf(text, capacity, "none: built without CUDA");
  return 0;
}

}  // namespace flashmoe::cuda
