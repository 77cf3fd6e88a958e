#include "cuda/kernel/grouped_product.cuh"

namespace flashmoe::cuda::kernel {

using config::Element;
using config::Epilogue;
using config::GroupedProductOf;
using config::Major;

KernelEntry grouped_product_fp16(Major major, Epilogue epilogue) {
  if (major == Major::kDepth) {
    return epilogue == Epilogue::kStore
               ? entry_of<GroupedProductOf<Element::kFp16, Major::kDepth, Epilogue::kStore>>()
               : entry_of<GroupedProductOf<Element::kFp16, Major::kDepth, Epilogue::kSwiglu>>();
  }
  return epilogue == Epilogue::kStore
             ? entry_of<GroupedProductOf<Element::kFp16, Major::kColumns, Epilogue::kStore>>()
             : entry_of<GroupedProductOf<Element::kFp16, Major::kColumns, Epilogue::kSwiglu>>();
}

}  // namespace flashmoe::cuda::kernel
