// What ThreadSanitizer sees of emulated kernels (tests/emulator): of each way to order accesses of
// CUDA threads, a kernel that has it is not reported, and the same kernel without it is.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <functional>
#include <utility>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/word.cuh"
#include "device.h"
#include "driver.h"

namespace flashmoe::emulator {
namespace {

namespace ptx = flashmoe::cuda::ptx;

constexpr uint32_t kBlock = 64;
constexpr int kSanitizerExit = 66;  // of a program with a report

// What the kernels share: all of a CTA's, and all of the launch's.
struct Shared {
  alignas(1024) std::array<int32_t, 32> tile;
  uint64_t barrier;
  uint32_t word;
};
struct Global {
  alignas(128) std::array<int32_t, 32> tile{};
  uint32_t word = 0;
  uint32_t flag = 0;
};

// The body of every thread.
using Body = std::function<void(Shared&, Global&)>;
struct Params {
  const Body* body;
  Global* global;
};

void run_body(const Body& body, Global& global) {
  static const char address = 0;
  register_kernel(&address, {[](const void* given) {
                               const auto& params = *static_cast<const Params*>(given);
                               (*params.body)(*reinterpret_cast<Shared*>(self().cta->shared),
                                              *params.global);
                             },
                             sizeof(Params)});
  const Params params{&body, &global};
  const auto* bytes = reinterpret_cast<const std::byte*>(&params);
  run({.grid = 2,
       .block = kBlock,
       .cluster = 2,
       .shared_bytes = sizeof(Shared),
       .function = &address,
       .params = {bytes, bytes + sizeof(params)},
       .seed = 1});
}

bool is_first() { return ptx::thread_idx() == 0; }
bool is_second() { return ptx::thread_idx() == 1; }
bool is_last() { return ptx::thread_idx() == kBlock - 1; }
bool is_first_of_grid() { return ptx::block_idx() == 0 && is_first(); }
bool is_last_of_grid() { return ptx::block_idx() == 1 && is_last(); }

// A barrier that one arrival completes, known to the cluster.
void init(uint64_t& barrier) {
  if (is_first()) ptx::mbarrier_init(&barrier, 1);
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}
void wait(uint64_t& barrier) {
  while (!ptx::mbarrier_try_wait_parity(&barrier, 0)) {
  }
}
void arrive(uint64_t& barrier, uint32_t num_bytes = 0) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier,
                                 num_bytes);
}

// The tile in global memory as the copy engine sees it: 8 by 4 elements.
CUtensorMap map_of(Global& global) {
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {8, 4}, strides[1] = {32};
  const cuuint32_t box[2] = {8, 4}, steps[2] = {1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      find_driver_function("cuTensorMapEncodeTiled"));
  EXPECT_EQ(encode(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, 2, global.tile.data(), sizes, strides, box,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                   CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
            CUDA_SUCCESS);
  return map;
}
constexpr int32_t kOrigin[2] = {0, 0};

// make(true) is the kernel with what orders its accesses, make(false) the one without.
struct Case {
  const char* name;
  Body (*make)(bool is_ordered, const CUtensorMap& map);
};
void PrintTo(const Case& which, std::ostream* out) { *out << which.name; }

class EmulatedRaces : public testing::TestWithParam<Case> {};

TEST_P(EmulatedRaces, AreReportedWithoutTheirOrderAndNotWithIt) {
  Global global;
  const CUtensorMap map = map_of(global);
  run_body(GetParam().make(true, map), global);
  EXPECT_EXIT(
      {
        run_body(GetParam().make(false, map), global);
        std::exit(0);
      },
      testing::ExitedWithCode(kSanitizerExit), "data race");
}

INSTANTIATE_TEST_SUITE_P(
    All, EmulatedRaces,
    testing::Values(
        Case{"Syncthreads",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_first()) shared.word = 1;
                 if (is_ordered) __syncthreads();
                 if (is_last()) shared.word = 2;
               };
             }},
        Case{"NamedBarrier",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_first()) shared.word = 1;
                 if (is_ordered) ptx::barrier_sync(1, kBlock);
                 if (is_last()) shared.word = 2;
               };
             }},
        Case{"SyncwarpAndNoShuffle",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_first()) shared.word = 1;
                 __shfl_sync(0xFFFFFFFF, 0, 0);
                 __ballot_sync(0xFFFFFFFF, 1);
                 if (is_ordered) __syncwarp();
                 if (is_second()) shared.word = 2;
               };
             }},
        Case{"ClusterBarrierAndNoBarrierOfTheCta",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_first_of_grid()) ptx::st_cluster(&shared.word, 1, 1);
                 __syncthreads();
                 if (is_ordered) ptx::barrier_cluster_arrive();
                 if (is_ordered) ptx::barrier_cluster_wait();
                 if (is_last_of_grid()) shared.word = 2;
               };
             }},
        Case{"ArrivalAndWait",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 init(shared.barrier);
                 if (is_first()) {
                   shared.word = 1;
                   arrive(shared.barrier);
                 }
                 if (!is_last()) return;
                 if (is_ordered) wait(shared.barrier);
                 shared.word = 2;
               };
             }},
        Case{"InitOfABarrier",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_first()) ptx::mbarrier_init(&shared.barrier, 1);
                 if (is_ordered) __syncthreads();
                 if (is_last()) arrive(shared.barrier);
               };
             }},
        Case{"ReleaseAndAcquireAndNoRelaxedFlag",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared&, Global& global) {
                 if (is_first_of_grid()) {
                   global.word = 1;
                   is_ordered ? ptx::st_release_gpu(&global.flag, 1)
                              : ptx::st_relaxed_sys(&global.flag, 1);
                 }
                 if (!is_last_of_grid()) return;
                 while (ptx::ld_acquire_gpu(&global.flag) != 1) {
                 }
                 global.word = 2;
               };
             }},
        Case{"FenceAndRelaxedFlag",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared&, Global& global) {
                 if (is_first_of_grid()) {
                   if (!is_ordered) __threadfence_system();
                   global.word = 1;
                   if (is_ordered) __threadfence_system();
                   ptx::st_relaxed_sys(&global.flag, 2);
                 }
                 if (!is_last_of_grid()) return;
                 while (ptx::ld_acquire_sys(&global.flag) != 2) {
                 }
                 global.word = 2;
               };
             }},
        Case{"AtomicAndNoPlainStore",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared&, Global& global) {
                 atomicAdd(&global.flag, 1u);
                 if (!is_ordered && is_last_of_grid()) global.flag = 0;
               };
             }},
        Case{"VolatileAndNoPlainStore",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 if (is_ordered) {
                   *const_cast<volatile uint32_t*>(&shared.word) = 1;
                 } else {
                   shared.word = 1;
                 }
               };
             }},
        Case{"BoxThatIsWaitedFor",
             [](bool is_ordered, const CUtensorMap& map) -> Body {
               return [=, &map](Shared& shared, Global&) {
                 init(shared.barrier);
                 if (is_first()) {
                   arrive(shared.barrier, sizeof(shared.tile));
                   ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                             shared.tile.data(), &map, kOrigin, &shared.barrier);
                 }
                 if (is_first() && is_ordered) wait(shared.barrier);
                 __syncthreads();
                 if (is_last()) shared.tile[3] = 1;
               };
             }},
        Case{"SourceOfABox",
             [](bool is_ordered, const CUtensorMap& map) -> Body {
               return [=, &map](Shared& shared, Global& global) {
                 init(shared.barrier);
                 if (is_first_of_grid()) {
                   arrive(shared.barrier, sizeof(shared.tile));
                   ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                             shared.tile.data(), &map, kOrigin, &shared.barrier);
                   if (is_ordered) wait(shared.barrier);
                   ptx::st_release_gpu(&global.flag, 3);
                 }
                 if (!is_last_of_grid()) return;
                 while (ptx::ld_acquire_gpu(&global.flag) != 3) {
                 }
                 global.tile[3] = 1;
               };
             }},
        Case{"StoreThatHasReadItsBuffer",
             [](bool is_ordered, const CUtensorMap& map) -> Body {
               return [=, &map](Shared& shared, Global&) {
                 if (is_first_of_grid()) {
                   ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, kOrigin,
                                             shared.tile.data());
                   ptx::cp_async_bulk_commit_group();
                   if (is_ordered) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
                 }
                 __syncthreads();
                 if (is_last()) shared.tile[3] = 1;
               };
             }},
        Case{"StoreThatHasEnded",
             [](bool is_ordered, const CUtensorMap& map) -> Body {
               return [=, &map](Shared& shared, Global& global) {
                 if (is_first_of_grid()) {
                   ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, kOrigin,
                                             shared.tile.data());
                   ptx::cp_async_bulk_commit_group();
                   if (is_ordered) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
                   ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
                   ptx::st_release_gpu(&global.flag, 4);
                 }
                 if (!is_last_of_grid()) return;
                 while (ptx::ld_acquire_gpu(&global.flag) != 4) {
                 }
                 global.tile[3] = 1;
               };
             }},
        Case{"CopyOfAThreadThatItWaitsFor",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global& global) {
                 if (is_first()) {
                   ptx::cp_async_16(ptx::shared_address(shared.tile.data()), global.tile.data(),
                                    16);
                   ptx::cp_async_commit_group();
                   if (is_ordered) ptx::cp_async_wait_group<0>();
                 }
                 __syncthreads();
                 if (is_last()) shared.tile[3] = 1;
               };
             }},
        Case{"StoreIntoThePairsOther",
             [](bool is_ordered, const CUtensorMap&) -> Body {
               return [=](Shared& shared, Global&) {
                 init(shared.barrier);
                 if (is_first_of_grid()) {
                   ptx::st_async_16(shared.tile.data(), int4{1, 2, 3, 4}, &shared.barrier, 1);
                 }
                 if (ptx::block_idx() == 0 || !is_last()) return;
                 arrive(shared.barrier, sizeof(int4));
                 if (is_ordered) wait(shared.barrier);
                 shared.tile[3] = 1;
               };
             }}),
    [](const auto& info) { return info.param.name; });

TEST(EmulatedRaces, ALaunchComesAfterTheHostAndAfterTheLaunchBefore) {
  Global global;
  global.word = 1;
  const Body add_one = [](Shared&, Global& of_launch) {
    if (is_last_of_grid()) of_launch.word += 1;
  };
  run_body(add_one, global);
  run_body(
      [](Shared&, Global& of_launch) {
        if (is_first_of_grid()) of_launch.word += 1;
      },
      global);
  EXPECT_EQ(global.word, 3u);
}

}  // namespace
}  // namespace flashmoe::emulator
