// The forward kernels of one element type and major order of w_up.
#pragma once

#include "cuda/kernel/forward.cuh"

namespace flashmoe::cuda::kernel {

template <config::Element kElement, config::Major kUpMajor, config::Epilogue kEpilogue>
ForwardEntry forward_entry_of(config::Major down_major) {
  using config::Major;
  return down_major == Major::kDepth
             ? forward_entry_of<config::ForwardOf<kElement, kUpMajor, kEpilogue, Major::kDepth>>()
             : forward_entry_of<
                   config::ForwardOf<kElement, kUpMajor, kEpilogue, Major::kColumns>>();
}

template <config::Element kElement, config::Major kUpMajor>
ForwardEntry forward_entry(config::Epilogue up_epilogue, config::Major down_major) {
  using config::Epilogue;
  if (up_epilogue == Epilogue::kActivate) {
    return forward_entry_of<kElement, kUpMajor, Epilogue::kActivate>(down_major);
  }
  // Depth-major weights never need pairs: a strided map takes alternate rows apart.
  if constexpr (kUpMajor == config::Major::kColumns) {
    if (up_epilogue == Epilogue::kGatedPairs) {
      return forward_entry_of<kElement, kUpMajor, Epilogue::kGatedPairs>(down_major);
    }
  }
  return forward_entry_of<kElement, kUpMajor, Epilogue::kGated>(down_major);
}

}  // namespace flashmoe::cuda::kernel
