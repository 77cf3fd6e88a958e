// Runs the project's CUDA kernels on the CPU: the sources under src/cuda, compiled as C++, with
// this folder's include/cuda/ptx in place of the instructions. Every CUDA thread is a fiber; the
// threads of a launch take turns on the OS thread that runs it, in an order that a seed decides.
//
// What it is for: values, protocols and addresses of the real kernels where there is no GPU. Copies
// and products that the hardware does in the background are done as late as the program allows or
// at a random time in between, so that a missing wait shows. ThreadSanitizer sees accesses that
// nothing orders (sanitizers.h). It knows nothing of the proxies' fences, of registers or of time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace flashmoe::emulator {

// A kernel whose one parameter is a struct by value.
struct Kernel {
  std::function<void(const void* params)> call;
  std::size_t params_bytes;
};

// Remembers the kernel behind an address, and finds it again. Throws std::out_of_range.
void register_kernel(const void* function, const Kernel& kernel);
const Kernel& find_kernel(const void* function);

struct Launch {
  uint32_t grid;     // CTAs, a multiple of `cluster`
  uint32_t block;    // threads of a CTA, a multiple of 32
  uint32_t cluster;  // CTAs of a cluster
  std::size_t shared_bytes;
  const void* function;
  std::vector<std::byte> params;
  uint64_t seed = 0;  // of the order of threads, 0: one after the other
};

// Returns when all threads have returned. Several OS threads may run a launch each. Throws
// std::runtime_error if no thread can go on.
void run(const Launch& launch);

}  // namespace flashmoe::emulator
