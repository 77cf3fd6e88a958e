#include "cuda/kernel/grouped_product.cuh"

namespace flashmoe::cuda::kernel {
namespace {

using config::Element;
using config::Epilogue;
using config::GroupedProductOf;
using config::Major;

template <Major kMajor>
KernelEntry entry_for(Epilogue epilogue) {
  constexpr Element kElement = Element::kFp16;
  switch (epilogue) {
    case Epilogue::kStore:
      return entry_of<GroupedProductOf<kElement, kMajor, Epilogue::kStore>>();
    case Epilogue::kActivate:
      return entry_of<GroupedProductOf<kElement, kMajor, Epilogue::kActivate>>();
    case Epilogue::kGated:
      return entry_of<GroupedProductOf<kElement, kMajor, Epilogue::kGated>>();
    case Epilogue::kGatedPairs:
      break;
  }
  // Depth-major weights never need it: a strided map takes alternate rows apart.
  return entry_of<GroupedProductOf<kElement, Major::kColumns, Epilogue::kGatedPairs>>();
}

}  // namespace

KernelEntry grouped_product_fp16(Major major, Epilogue epilogue) {
  return major == Major::kDepth ? entry_for<Major::kDepth>(epilogue)
                                : entry_for<Major::kColumns>(epilogue);
}

}  // namespace flashmoe::cuda::kernel
