// Writes into the shared memory of another CTA of the cluster.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Stores 16 bytes at the place of `destination` in CTA `cta_rank` and then counts them on the
// barrier at the place of `barrier` there, which publishes them to who waits on it. Any thread,
// sm_90.
FM_DEVICE void st_async_16(void* destination, int4 value, uint64_t* barrier, uint32_t cta_rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, counter;\n\t"
      "mapa.shared::cluster.u32 to, %0, %6;\n\t"
      "mapa.shared::cluster.u32 counter, %1, %6;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[to], {%2, %3, %4, %5}, [counter];\n\t"
      "}"
      :
      : "r"(shared_address(destination)), "r"(shared_address(barrier)), "r"(value.x), "r"(value.y),
        "r"(value.z), "r"(value.w), "r"(cta_rank)
      : "memory");
}

// Stores a word at the place of `destination` in CTA `cta_rank`; a cluster barrier publishes it.
// Any thread, sm_90.
FM_DEVICE void st_cluster(uint32_t* destination, uint32_t value, uint32_t cta_rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "st.shared::cluster.u32 [to], %1;\n\t"
      "}"
      :
      : "r"(shared_address(destination)), "r"(value), "r"(cta_rank)
      : "memory");
}

}  // namespace flashmoe::cuda::ptx
