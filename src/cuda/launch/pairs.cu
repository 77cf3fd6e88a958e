#include "cuda/launch/pairs.h"

#include <algorithm>

#include "cuda/config/grouped_product.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"

namespace flashmoe::cuda::launch {
namespace {

void check_kernel(const PairKernel& kernel) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check_device(device);
  const int shared_limit = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (kernel.shared_bytes > static_cast<std::size_t>(shared_limit)) {
    fail(FM_UNSUPPORTED, "device ", device, " gives a block ", shared_limit,
         " bytes of shared memory; ", kernel.name, " needs ", kernel.shared_bytes);
  }
}

// Clusters that fit on the current device at once. Asked for each launch: the answer depends on
// what else holds the device (MPS, green contexts), and costs microseconds.
int max_clusters(const PairKernel& kernel, const cudaLaunchConfig_t& launch) {
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kernel.shared_bytes)),
        "cudaFuncSetAttribute(", kernel.name, ")");
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &launch),
        "cudaOccupancyMaxActiveClusters(", kernel.name, ")");
  if (clusters < 1) fail(FM_UNSUPPORTED, "no pair of SMs is free for a cluster of two CTAs");
  return clusters;
}

}  // namespace

void launch_pairs(const PairKernel& kernel, void* params, int max_sms, bool cooperative,
                  cudaStream_t stream) {
  check_kernel(kernel);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {config::kClusterSize, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(config::kClusterSize);
  launch.blockDim = dim3(kernel.num_threads);
  launch.dynamicSmemBytes = kernel.shared_bytes;
  launch.attrs = attributes;
  launch.numAttrs = 1;
  launch.stream = stream;
  int clusters = max_clusters(kernel, launch);
  if (max_sms > 0) clusters = std::min(clusters, std::max(max_sms / config::kClusterSize, 1));
  launch.gridDim = dim3(config::kClusterSize * clusters);
  launch.numAttrs = cooperative ? 2 : 1;
  void* operands[] = {params};
  check(cudaLaunchKernelExC(&launch, kernel.function, operands), "launch of ", kernel.name);
}

}  // namespace flashmoe::cuda::launch
