// The CUDA runtime and the driver that the emulator offers (tests/emulator): the orders and the
// refusals that the library relies on.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <future>
#include <thread>

#include "device.h"
#include "fibers.h"
#include "machine.h"
#include "sanitizers.h"
#include "tensor_map.h"
#include "virtual_memory.h"

namespace flashmoe::emulator {
namespace {

class Devices : public testing::Environment {
 public:
  void SetUp() override { setenv("FLASHMOE_EMULATED_GPUS", "2", 0); }
};
const auto* const kDevicesAreSet = testing::AddGlobalTestEnvironment(new Devices);

// A stream of its own on a device.
class Stream {
 public:
  explicit Stream(int device = 0) : device_(device) {
    cudaSetDevice(device);
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    cudaSetDevice(0);
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

  void record(cudaEvent_t event) const {
    cudaSetDevice(device_);
    EXPECT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
    cudaSetDevice(0);
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
};

TEST(Streams, OfAllDevicesWaitForAnEvent) {
  const Stream first(0), second(1);
  std::promise<void> may_end;
  queue_of(first.get())->add([&] { may_end.get_future().wait(); });
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess) << "never recorded";
  first.record(event);
  ASSERT_EQ(cudaStreamWaitEvent(second.get(), event, 0), cudaSuccess);
  std::atomic<bool> went_on{false};
  queue_of(second.get())->add([&] { went_on = true; });
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(went_on);
  may_end.set_value();
  EXPECT_EQ(cudaStreamSynchronize(second.get()), cudaSuccess);
  EXPECT_TRUE(went_on);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  cudaGetLastError();
}

TEST(Streams, OfOneDeviceWaitForNoneOfTheOthers) {
  const Stream first, second;
  std::promise<void> may_end;
  queue_of(first.get())->add([&] { may_end.get_future().wait(); });
  int word = 0;
  ASSERT_EQ(cudaMemsetAsync(&word, 1, sizeof(word), second.get()), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(second.get()), cudaSuccess);
  EXPECT_EQ(word, 0x01010101);
  may_end.set_value();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(queue_of(first.get())->end().wait_for(std::chrono::seconds(10)),
            std::future_status::ready);
}

TEST(Memory, IsPoisonedAndEndsWhereItEnds) {
  constexpr int kBytes = 300;
  auto* const memory = static_cast<volatile uint8_t*>(take_memory(kBytes));
  ASSERT_NE(memory, nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0u);
  for (int i = 0; i < kBytes; ++i) ASSERT_EQ(memory[i], kPoison);
  // A sanitizer sees the byte after the last; without one the page after the allocation faults.
  const int end = kChecksAddresses ? kBytes : 512;
  memory[end - 1] = 1;
  EXPECT_DEATH(memory[end] = 1, "");
  auto* const given = const_cast<uint8_t*>(memory);
  EXPECT_TRUE(release_memory(given));
  EXPECT_FALSE(release_memory(given));
  EXPECT_DEATH(memory[0] = 1, "");
  EXPECT_EQ(take_memory(kMemoryBytes + 1), nullptr);
}

// --- launches -----------------------------------------------------------------------------------

struct Counters {
  std::atomic<int>* num_threads;
  int step;
};

const void* counting_kernel() {
  static const char address = 0;
  register_kernel(&address, {[](const void* params) {
                               const auto& counters = *static_cast<const Counters*>(params);
                               *counters.num_threads += counters.step;
                             },
                             sizeof(Counters)});
  return &address;
}

class Launching {
 public:
  explicit Launching(uint32_t grid, uint32_t cluster = 2) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim = {cluster, 1, 1};
    attributes_[1].id = cudaLaunchAttributeCooperative;
    attributes_[1].val.cooperative = 1;
    config.gridDim = dim3(grid);
    config.blockDim = dim3(64);
    config.attrs = attributes_.data();
    config.numAttrs = 2;
  }
  cudaError_t run(const void* function) {
    Counters counters{&num_threads, 3};
    void* params[] = {&counters};
    const cudaError_t status = cudaLaunchKernelExC(&config, function, params);
    counters.step = 0;  // what was given is what it was at the launch
    cudaStreamSynchronize(config.stream);
    return status;
  }

  cudaLaunchConfig_t config{};
  std::atomic<int> num_threads{0};

 private:
  std::array<cudaLaunchAttribute, 2> attributes_{};
};

TEST(Launches, RunEveryThreadWithTheParametersOfTheCall) {
  Launching launching(4);
  EXPECT_EQ(launching.run(counting_kernel()), cudaSuccess);
  EXPECT_EQ(launching.num_threads, 4 * 64 * 3);
}

TEST(Launches, ThatAGpuRefusesAreRefused) {
  const auto num_sms = static_cast<uint32_t>(machine().num_sms);
  const void* const kernel = counting_kernel();
  EXPECT_EQ(Launching(num_sms + 2).run(kernel), cudaErrorCooperativeLaunchTooLarge);
  EXPECT_EQ(Launching(3).run(kernel), cudaErrorInvalidConfiguration) << "half a cluster";
  EXPECT_EQ(Launching(2).run(&num_sms), cudaErrorInvalidDeviceFunction);
  Launching large(2);
  large.config.dynamicSmemBytes = 64 * 1024;
  EXPECT_EQ(large.run(kernel), cudaErrorInvalidValue) << "without asking for it";
  const auto set = [&](int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  EXPECT_EQ(set(228 * 1024), cudaErrorInvalidValue);
  EXPECT_EQ(set(64 * 1024), cudaSuccess);
  EXPECT_EQ(large.run(kernel), cudaSuccess);
  Launching elsewhere(2);
  const Stream other(1);
  elsewhere.config.stream = other.get();
  EXPECT_EQ(elsewhere.run(kernel), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

#ifdef __SANITIZE_ADDRESS__

// A launch of two CTAs, of which the last thread writes one byte of what it is given.
struct Write {
  enum class Where { kShared, kGlobal, kStack } where;
  uint8_t* global;
  std::size_t byte;

  void operator()() const {
    volatile uint8_t own[40] = {};
    yield();
    const bool is_last = self().idx + 1 == launch().block && self().cta->rank == 1;
    if (!is_last) return;
    volatile uint8_t* const memory = where == Where::kGlobal ? global
                                     : where == Where::kShared
                                         ? reinterpret_cast<uint8_t*>(self().cta->shared)
                                         : own;
    memory[byte] = 1;
    yield();
  }
};

void run_write(const Write& write) {
  static const char address = 0;
  register_kernel(&address, {[](const void* params) { (*static_cast<const Write*>(params))(); },
                             sizeof(Write)});
  const auto* bytes = reinterpret_cast<const std::byte*>(&write);
  run({.grid = 2,
       .block = 64,
       .cluster = 2,
       .shared_bytes = 1000,
       .function = &address,
       .params = {bytes, bytes + sizeof(write)}});
}

TEST(Sanitizer, SeesAKernelLeaveItsMemory) {
  constexpr std::size_t kBytes = 300;
  auto* const global = static_cast<uint8_t*>(take_memory(kBytes));
  run_write({Write::Where::kShared, nullptr, 999});
  EXPECT_DEATH(run_write({Write::Where::kShared, nullptr, 1000}), "use-after-poison");
  EXPECT_DEATH(run_write({Write::Where::kShared, nullptr, kSharedLimit}), "use-after-poison");
  run_write({Write::Where::kGlobal, global, kBytes - 1});
  EXPECT_DEATH(run_write({Write::Where::kGlobal, global, kBytes}), "use-after-poison");
  run_write({Write::Where::kStack, nullptr, 39});
  EXPECT_DEATH(run_write({Write::Where::kStack, nullptr, 40}), "stack-buffer-overflow");
  EXPECT_TRUE(release_memory(global));
}

#endif

// --- the driver ---------------------------------------------------------------------------------

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  EXPECT_EQ(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
            cudaSuccess);
  EXPECT_EQ(result, cudaDriverEntryPointSuccess) << name;
  return reinterpret_cast<Function>(found);
}

// A matrix of 100 rows of 64 elements, and boxes of it.
struct Matrix {
  alignas(16) std::array<uint8_t, 64> memory{};
  void* base = memory.data();
  cuuint64_t sizes[2] = {64, 100};
  cuuint64_t strides[1] = {128};
  cuuint32_t box[2] = {64, 32};
  cuuint32_t steps[2] = {1, 1};
  CUtensorMap map{};

  CUresult encode() {
    return driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled")(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
};

TEST(TensorMaps, HoldWhatTheyWereMadeOf) {
  Matrix matrix;
  ASSERT_EQ(matrix.encode(), CUDA_SUCCESS);
  const TensorMap& map = read_map(&matrix.map);
  EXPECT_EQ(map.base, matrix.base);
  EXPECT_EQ(map.rank, 2);
  EXPECT_EQ(map.element_bytes, 2);
  EXPECT_EQ(map.sizes[1], 100u);
  EXPECT_EQ(map.strides[0], 2u);
  EXPECT_EQ(map.strides[1], 128u);
  EXPECT_EQ(map.box[1], 32);
}

TEST(TensorMaps, ThatTheDriverRefusesAreRefused) {
  const auto refused = [](const char* why, auto&& change) {
    Matrix matrix;
    change(matrix);
    EXPECT_EQ(matrix.encode(), CUDA_ERROR_INVALID_VALUE) << why;
  };
  refused("address", [](Matrix& m) { m.base = m.memory.data() + 8; });
  refused("stride", [](Matrix& m) { m.strides[0] = 136; });
  refused("wide stride", [](Matrix& m) { m.strides[0] = cuuint64_t{1} << 40; });
  refused("no rows", [](Matrix& m) { m.sizes[1] = 0; });
  refused("long box", [](Matrix& m) { m.box[1] = 257; });
  refused("empty box", [](Matrix& m) { m.box[1] = 0; });
  refused("box over the swizzle", [](Matrix& m) { m.box[0] = 72; });
  refused("box of no 16 bytes", [](Matrix& m) { m.box[0] = 12; });
  refused("steps", [](Matrix& m) { m.steps[1] = 2; });
}

TEST(VirtualMemory, IsOneMemoryAtTwoAddresses) {
  CUmemAllocationProp wanted{};
  wanted.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 1};
  size_t bytes = 0;
  ASSERT_EQ(memory_granularity(&bytes, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            CUDA_SUCCESS);
  CUmemGenericAllocationHandle own = 0, imported = 0;
  EXPECT_EQ(create_memory(&own, bytes + 1, &wanted, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(create_memory(&own, bytes, &wanted, 0), CUDA_SUCCESS);
  int file = -1;
  constexpr auto kFile = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  ASSERT_EQ(export_handle(&file, own, kFile, 0), CUDA_SUCCESS);
  ASSERT_EQ(import_handle(&imported, reinterpret_cast<void*>(static_cast<intptr_t>(file)), kFile),
            CUDA_SUCCESS);
  std::array<CUdeviceptr, 2> places{};
  const CUmemAccessDesc access{.location = wanted.location,
                               .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  for (size_t i = 0; i < places.size(); ++i) {
    ASSERT_EQ(reserve_addresses(&places[i], bytes, 0, 0, 0), CUDA_SUCCESS);
    ASSERT_EQ(map_memory(places[i], bytes, 0, i == 0 ? own : imported, 0), CUDA_SUCCESS);
    EXPECT_DEATH(*reinterpret_cast<volatile uint32_t*>(places[i]) = 1, "") << "without access";
    ASSERT_EQ(set_access(places[i], bytes, &access, 1), CUDA_SUCCESS);
  }
  EXPECT_EQ(release_handle(own), CUDA_SUCCESS);
  EXPECT_EQ(release_handle(imported), CUDA_SUCCESS);
  auto* const first = reinterpret_cast<volatile uint32_t*>(places[0]);
  auto* const second = reinterpret_cast<volatile uint32_t*>(places[1]);
  EXPECT_EQ(*second, 0xA5A5A5A5) << "nothing is zero by itself";
  *first = 17;
  EXPECT_EQ(*second, 17u);
  for (const CUdeviceptr place : places) {
    EXPECT_EQ(unmap_memory(place, bytes), CUDA_SUCCESS);
    EXPECT_EQ(free_addresses(place, bytes), CUDA_SUCCESS);
  }
}

}  // namespace
}  // namespace flashmoe::emulator
