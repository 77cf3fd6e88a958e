#include "driver.h"

#include <cuda.h>

#include <iterator>

#include "tensor_map.h"
#include "virtual_memory.h"

namespace flashmoe::emulator {
namespace {

CUresult get_error_string(CUresult error, const char** text) {
  switch (error) {
    case CUDA_SUCCESS:
      *text = "no error";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_VALUE:
      *text = "invalid argument";
      return CUDA_SUCCESS;
    case CUDA_ERROR_OUT_OF_MEMORY:
      *text = "out of memory";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_DEVICE:
      *text = "invalid device ordinal";
      return CUDA_SUCCESS;
    default:
      *text = nullptr;
      return CUDA_ERROR_INVALID_VALUE;
  }
}

uint8_t bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;  // not emulated
  }
}

bool is_accepted(const TensorMap& map) {
  constexpr uint64_t kAlignment = 16;
  constexpr uint64_t kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
  constexpr uint32_t kMaxBox = 256, kSwizzleSpan = 128;
  const auto base = reinterpret_cast<uintptr_t>(map.base);
  if (base == 0 || base % kAlignment != 0 || map.element_bytes == 0) return false;
  for (uint32_t dim = 0; dim < map.rank; ++dim) {
    if (map.sizes[dim] == 0 || map.sizes[dim] > kMaxSize) return false;
    if (map.box[dim] == 0 || map.box[dim] > kMaxBox) return false;
    if (dim > 0 && (map.strides[dim] % kAlignment != 0 || map.strides[dim] >= kMaxStride)) {
      return false;
    }
  }
  const uint32_t inner_bytes = uint32_t{map.box[0]} * map.element_bytes;
  return inner_bytes % kAlignment == 0 && (map.is_swizzled == 0 || inner_bytes <= kSwizzleSpan);
}

// Refuses what the hardware's driver refuses, and what is not emulated: interleaved layouts, steps
// between elements, and any swizzle but that of 128 bytes.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  constexpr uintptr_t kMapAlignment = 64;  // as documented; the type of CUDA 13 has more
  const bool is_swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (reinterpret_cast<uintptr_t>(map) % kMapAlignment != 0 || rank < 1 ||
      rank > std::size(TensorMap{}.box) || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      (!is_swizzled && swizzle != CU_TENSOR_MAP_SWIZZLE_NONE)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap made{};
  made.base = base;
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = bytes_of(type);
  made.is_swizzled = is_swizzled ? 1 : 0;
  for (uint32_t dim = 0; dim < rank; ++dim) {
    if (element_steps[dim] != 1 || box[dim] > UINT16_MAX) return CUDA_ERROR_INVALID_VALUE;
    made.sizes[dim] = sizes[dim];
    made.strides[dim] = dim == 0 ? made.element_bytes : strides[dim - 1];
    made.box[dim] = static_cast<uint16_t>(box[dim]);
  }
  if (!is_accepted(made)) return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

struct Function {
  std::string_view name;
  void* address;
};

// The address of `function`, which has the type of the driver's own.
template <class Own>
Function function_of(std::string_view name, Own function) {
  return {name, reinterpret_cast<void*>(function)};
}

}  // namespace

void* find_driver_function(std::string_view name) {
  static const Function functions[] = {
      function_of<decltype(&cuGetErrorString)>("cuGetErrorString", get_error_string),
      function_of<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", encode_tiled),
      function_of<decltype(&cuDeviceGetAttribute)>("cuDeviceGetAttribute", device_attribute),
      function_of<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity",
                                                            memory_granularity),
      function_of<decltype(&cuMemCreate)>("cuMemCreate", create_memory),
      function_of<decltype(&cuMemRelease)>("cuMemRelease", release_handle),
      function_of<decltype(&cuMemAddressReserve)>("cuMemAddressReserve", reserve_addresses),
      function_of<decltype(&cuMemAddressFree)>("cuMemAddressFree", free_addresses),
      function_of<decltype(&cuMemMap)>("cuMemMap", map_memory),
      function_of<decltype(&cuMemUnmap)>("cuMemUnmap", unmap_memory),
      function_of<decltype(&cuMemSetAccess)>("cuMemSetAccess", set_access),
      function_of<decltype(&cuMemExportToShareableHandle)>("cuMemExportToShareableHandle",
                                                           export_handle),
      function_of<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle",
                                                             import_handle),
  };
  for (const Function& function : functions) {
    if (function.name == name) return function.address;
  }
  return nullptr;
}

}  // namespace flashmoe::emulator
