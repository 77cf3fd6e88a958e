// 16-byte copies from global to shared memory that a thread does not wait for.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Copies num_bytes (16, or 0: the destination is filled with zeros) past the first-level cache.
// Any thread, sm_80.
FM_DEVICE void cp_async_16(uint32_t shared_destination, const void* source, uint32_t num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_destination), "l"(source), "r"(num_bytes)
               : "memory");
}

// The thread's copies since the last commit become one group. Any thread, sm_80.
FM_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Returns when at most kPending of the thread's groups are under way. Any thread, sm_80.
template <int kPending>
FM_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

}  // namespace flashmoe::cuda::ptx
