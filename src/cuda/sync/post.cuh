// Flags for other ranks. A release at system scope waits until all that was written before it has
// arrived, over NVLink too: microseconds in which a warp that sends would send nothing. So warps
// drop the flag at a box of their own, and one warp of the CTA releases for all of them: one fence
// for what has come together.
#pragma once

#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/word.cuh"

namespace flashmoe::cuda::sync {

// A flag word that is to hold the epoch at some ranks.
struct Letter {
  uint32_t word;   // index among the flags of a region
  uint32_t ranks;  // bits; not 0
};

// In shared memory. box[w]: writer: warp w when it is empty, the posting warp when it is full;
// publishes (by release and acquire at CTA scope) what the warp wrote before it.
template <int kWarps>
struct PostOffice {
  uint64_t boxes[kWarps];

  static constexpr uint64_t kEmpty = 0;
  static constexpr uint64_t kClosed = 1;  // the warp sends no more: no letter, since ranks are 0

  FM_DEVICE void init() {
    for (uint64_t& box : boxes) box = kEmpty;
  }

  // Whole warp, after the stores that the flag is for.
  FM_DEVICE void send(int32_t warp_idx, const Letter& letter) {
    put(warp_idx, uint64_t{letter.ranks} << 32 | letter.word);
  }
  // Whole warp, once, after its last letter.
  FM_DEVICE void close(int32_t warp_idx) { put(warp_idx, kClosed); }

  // The posting warp: raises flags until all boxes are closed. flag_of(rank, word) is their
  // address. Whole warp.
  template <class FlagOf>
  FM_DEVICE void run(uint32_t epoch, const FlagOf& flag_of) {
    static_assert(kWarps <= 32);
    const int32_t lane = ptx::lane_idx();
    while (true) {
      uint64_t found = lane < kWarps ? ptx::ld_acquire_cta(&boxes[lane]) : kClosed;
      const auto ranks = static_cast<uint32_t>(found >> 32);
      if (__any_sync(0xFFFFFFFF, ranks != 0)) {
        __threadfence_system();
        for (uint32_t left = ranks; left != 0; left &= left - 1) {
          ptx::st_relaxed_sys(
              flag_of(__ffs(static_cast<int>(left)) - 1, static_cast<uint32_t>(found)), epoch);
        }
        if (ranks != 0) ptx::st_release_cta(&boxes[lane], kEmpty);
      } else if (__all_sync(0xFFFFFFFF, found == kClosed)) {
        return;
      } else {
        __nanosleep(kPause);
      }
    }
  }

 private:
  static constexpr uint32_t kPause = 50;  // ns

  // The posting warp waits for nothing but these boxes, so a box is soon empty.
  FM_DEVICE void put(int32_t warp_idx, uint64_t letter) {
    __syncwarp();
    if (ptx::lane_idx() != 0) return;
    while (ptx::ld_acquire_cta(&boxes[warp_idx]) != kEmpty) __nanosleep(kPause);
    ptx::st_release_cta(&boxes[warp_idx], letter);
  }
};

}  // namespace flashmoe::cuda::sync
