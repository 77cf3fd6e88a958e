// Barriers that <cuda/ptx> lacks.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// One arrival on the barrier at the same place in the CTA `cta_rank` of the cluster. Any thread,
// sm_90. Default order (release, CTA scope), as the pair's stages need it: the form with
// .release.cluster compiles to a fence of the whole GPU and costs the main loop a third.
FM_DEVICE void mbarrier_arrive_cluster_default(uint64_t* barrier, uint32_t cta_rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t"
      "}"
      :
      : "r"(shared_address(barrier)), "r"(cta_rank)
      : "memory");
}

// Waits until `num_threads` threads have come to hardware barrier `barrier_idx`; orders their
// shared memory. Whole warps, sm_70.
FM_DEVICE void barrier_sync(int barrier_idx, int num_threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier_idx), "r"(num_threads) : "memory");
}

// The same, and tells every thread whether `vote` held in all. Whole warps, sm_70.
FM_DEVICE bool barrier_sync_and(int barrier_idx, int num_threads, bool vote) {
  uint32_t all;
  asm volatile(
      "{\n\t"
      ".reg .pred mine, everyone;\n\t"
      "setp.ne.u32 mine, %1, 0;\n\t"
      "bar.red.and.pred everyone, %2, %3, mine;\n\t"
      "selp.u32 %0, 1, 0, everyone;\n\t"
      "}"
      : "=r"(all)
      : "r"(static_cast<uint32_t>(vote)), "r"(barrier_idx), "r"(num_threads)
      : "memory");
  return all != 0;
}

}  // namespace flashmoe::cuda::ptx
