#include "cuda/launch/tensor_map.h"

#include "cuda/launch/check.h"
#include "cuda/tile/window.h"

namespace flashmoe::cuda::launch {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function of CUDA 12.0, which all later drivers have.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      fail(FM_UNSUPPORTED, "the CUDA driver has no cuTensorMapEncodeTiled: 525 or newer is needed");
    }
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap encode(const TensorView& view, config::Element element, const char* name) {
  const CUtensorMapDataType type = element == config::Element::kBf16
                                       ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const uint32_t ones[kMaxTensorDims] = {1, 1, 1, 1, 1};
  // Not the object that is returned: the driver refuses an address that is not aligned, and g++ 12
  // at -O1 does not align every place for a result.
  struct {
    CUtensorMap map;
  } made{};
  const CUresult status = encode_tiled()(
      &made.map, type, view.num_dims, const_cast<void*>(view.base), view.sizes, view.strides + 1,
      view.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return made.map;
  std::ostringstream text;
  for (int dim = 0; dim < view.num_dims; ++dim) {
    text << (dim ? ", " : "") << view.sizes[dim] << " (stride " << view.strides[dim] << ", box "
         << view.box[dim] << ")";
  }
  fail(FM_INTERNAL, name, ": the CUDA driver refused the tensor map at ", view.base, ": ",
       text.str(), ", error ", static_cast<int>(status));
}

TensorView rows_view(const void* base, int64_t num_rows, int64_t columns, uint32_t box_columns,
                     uint32_t box_rows) {
  const auto row_bytes = static_cast<uint64_t>(columns) * config::kElementBytes;
  // A map without rows is refused; one that is never used need not be right.
  const uint64_t rows = num_rows > 0 ? num_rows : 1;
  return {.base = base,
          .num_dims = 2,
          .sizes = {static_cast<uint64_t>(columns), rows},
          .strides = {config::kElementBytes, row_bytes},
          .box = {box_columns, box_rows}};
}

TensorView window_view(const void* base, int64_t num_rows, int64_t columns, uint32_t box_columns,
                       uint32_t box_rows) {
  constexpr uint64_t kTurns = 0x7FFF0000;  // any number over tile::kWindow
  const auto row_bytes = static_cast<uint64_t>(columns) * config::kElementBytes;
  return {.base = base,
          .num_dims = 4,
          .sizes = {static_cast<uint64_t>(columns), tile::kWindow,
                    static_cast<uint64_t>(num_rows) + 1, kTurns},
          .strides = {config::kElementBytes, row_bytes, row_bytes, tile::kWindowTurn - row_bytes},
          .box = {box_columns, box_rows, 1, 1}};
}

}  // namespace flashmoe::cuda::launch
