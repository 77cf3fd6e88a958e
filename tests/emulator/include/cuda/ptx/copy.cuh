// src/cuda/ptx/copy.cuh for the emulator. Copies end when the thread waits for them.
#pragma once

#include <cstring>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

inline void cp_async_16(uint32_t shared_destination, const void* source, uint32_t num_bytes) {
  std::byte* to = emulator::at_shared(shared_destination);
  emulator::see_read(source, num_bytes);
  emulator::see_write(to, 16);
  emulator::self().loads.add([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, source, num_bytes);
  });
}
inline void cp_async_commit_group() { emulator::self().loads.commit(); }
template <int kPending>
void cp_async_wait_group() {
  emulator::self().loads.wait(kPending);
}
inline int4 ld_stream_16(const void* source) { return *static_cast<const int4*>(source); }

}  // namespace flashmoe::cuda::ptx
