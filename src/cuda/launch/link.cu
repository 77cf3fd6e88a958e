#include "cuda/launch/link.h"

#include <cuda_runtime.h>

#include <cuda/atomic>

#include "cuda/fabric/device_region.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda {
namespace {

using launch::check;
using launch::DeviceGuard;

constexpr int64_t kBytes = int64_t{64} << 20;
constexpr int kCopies = 8;
constexpr uint32_t kRounds = 1000;
constexpr long long kPatience = 2'000'000'000;  // clocks, about a second
constexpr int64_t kFlagBytes = 256;             // in front of the data

using Word = ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system>;

// One of two players of ping-pong, a thread each. `own`, `other`: their words; the one who begins
// raises the other's word to 1, 3, ... and waits for 2, 4, ... in its own.
__global__ void play(uint32_t* own, uint32_t* other, bool begins) {
  const long long start = clock64();
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t mine = 2 * round + (begins ? 1 : 2);
    if (begins) Word(*other).store(mine, ::cuda::memory_order_release);
    const uint32_t expected = begins ? mine + 1 : mine - 1;
    while (Word(*own).load(::cuda::memory_order_acquire) != expected) {
      if (clock64() - start > kPatience) return;
    }
    if (!begins) Word(*other).store(mine, ::cuda::memory_order_release);
  }
}

__global__ void copy(const uint4* from, uint4* to, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

struct Stream {
  explicit Stream(int32_t on) : device(on) {
    const DeviceGuard guard(device);
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int32_t device;
  cudaStream_t stream = nullptr;
};

struct Timer {
  Timer() {
    check(cudaEventCreate(&first), "cudaEventCreate");
    check(cudaEventCreate(&last), "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(first);
    cudaEventDestroy(last);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Of what `body` launches, on the current device.
  template <class Body>
  double seconds(cudaStream_t stream, Body&& body) {
    check(cudaEventRecord(first, stream), "cudaEventRecord");
    body();
    check(cudaGetLastError(), "a launch that measures a link");
    check(cudaEventRecord(last, stream), "cudaEventRecord");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, first, last), "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

  cudaEvent_t first = nullptr, last = nullptr;
};

void check_pair(int32_t device, int32_t peer) {
  for (const int32_t one : {device, peer}) {
    launch::check_device(one);
    const DeviceGuard guard(one);
    check(cudaFree(nullptr), "the context of CUDA device ", one);
  }
  if (device == peer) fail(FM_INVALID_VALUE, "device and peer are both ", device);
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer(", device, ", ", peer,
        ")");
  if (can == 0) {
    fail(FM_UNSUPPORTED, "CUDA device ", device, " cannot reach the memory of CUDA device ", peer);
  }
}

double flag_seconds(const DeviceRegion& own, const DeviceRegion& other, const Stream& here,
                    const Stream& there) {
  auto* own_word = static_cast<uint32_t*>(own.address());
  auto* other_word = static_cast<uint32_t*>(other.address());
  {
    const DeviceGuard guard(there.device);
    play<<<1, 1, 0, there.stream>>>(other_word, own_word, false);
    check(cudaGetLastError(), "a launch that measures a link");
  }
  const DeviceGuard guard(here.device);
  Timer timer;
  const double seconds = timer.seconds(
      here.stream, [&] { play<<<1, 1, 0, here.stream>>>(own_word, other_word, true); });
  check(cudaStreamSynchronize(there.stream), "cudaStreamSynchronize");
  return seconds / (2.0 * kRounds);
}

double bytes_per_second(const DeviceRegion& own, const DeviceRegion& other, const Stream& here) {
  const DeviceGuard guard(here.device);
  const auto* from = reinterpret_cast<const uint4*>(static_cast<char*>(own.address()) + kFlagBytes);
  auto* to = reinterpret_cast<uint4*>(static_cast<char*>(other.address()) + kFlagBytes);
  const auto send = [&](int copies) {
    for (int i = 0; i < copies; ++i) {
      copy<<<264, 512, 0, here.stream>>>(from, to, kBytes / static_cast<int64_t>(sizeof(uint4)));
    }
  };
  send(1);
  Timer timer;
  return kBytes * kCopies / timer.seconds(here.stream, [&] { send(kCopies); });
}

}  // namespace

LinkSpeed measure_link(int32_t device, int32_t peer) {
  check_pair(device, peer);
  const int64_t bytes = kFlagBytes + kBytes;
  const DeviceRegion own = DeviceRegion::create(device, bytes, false, {device, peer});
  const DeviceRegion other = DeviceRegion::create(peer, bytes, false, {device, peer});
  const Stream here(device), there(peer);
  flag_seconds(own, other, here, there);  // loads the kernels
  return {.bytes_per_second = bytes_per_second(own, other, here),
          .flag_seconds = flag_seconds(own, other, here, there)};
}

}  // namespace flashmoe::cuda
