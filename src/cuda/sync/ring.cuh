// Rings of shared-memory slots between roles. Each object owns its place in the ring and the phase
// bits: no role sees either.
//
// Protocol of one slot: `full` completes when its contents are there (one arrival that announces
// the bytes, then the bytes), `empty` when every reader has arrived. Phase n of `full` belongs to
// the slot's n-th contents; a writer of contents n waits for phase n - 1 of `empty`.
#pragma once

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/sync/wait.cuh"

namespace flashmoe::cuda::sync {

// A place in a ring of kSlots slots, and the parity of its phase.
template <int kSlots>
class RingCursor {
 public:
  FM_DEVICE int slot() const { return slot_; }
  FM_DEVICE uint32_t parity() const { return parity_; }
  FM_DEVICE void advance() {
    if (++slot_ == kSlots) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }
  FM_DEVICE void skip(int num_slots) {
    slot_ += num_slots;
    parity_ ^= (slot_ / kSlots) & 1;
    slot_ %= kSlots;
  }
  // The place as a word, and back to it.
  FM_DEVICE uint32_t word() const { return 2 * static_cast<uint32_t>(slot_) + parity_; }
  FM_DEVICE void set(uint32_t word) {
    slot_ = static_cast<int>(word / 2);
    parity_ = word % 2;
  }

 private:
  int slot_ = 0;
  uint32_t parity_ = 0;
};

template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots];
  uint64_t empty[kSlots];

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init(int num_readers) {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::mbarrier_init(&full[slot], 1);
      ptx::mbarrier_init(&empty[slot], num_readers);
    }
  }
};

// An end of the ring of operand stages that fills them: one thread. Of several that copy into a
// stage one announces it; copies that end before the announcement count just as well.
template <int kSlots>
class StageWriter {
 public:
  FM_DEVICE explicit StageWriter(RingBarriers<kSlots>& barriers) : barriers_(barriers) {}

  FM_DEVICE void acquire(Waiter& waiter) {
    waiter.wait(&barriers_.empty[cursor_.slot()], cursor_.parity() ^ 1, WaitTag::kStageEmpty);
  }
  // Announces how many bytes are copied into this CTA's stage.
  FM_DEVICE void announce(uint32_t num_bytes) {
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full(),
                                   num_bytes);
  }
  // Returns when all that was ever filled has been read: its memory may hold something else then.
  FM_DEVICE void drain(Waiter& waiter) const {
    StageWriter next = *this;
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) {
      next.acquire(waiter);
      next.advance();
    }
  }
  FM_DEVICE RingCursor<kSlots>& cursor() { return cursor_; }
  FM_DEVICE int slot() const { return cursor_.slot(); }
  FM_DEVICE uint64_t* full() const { return &barriers_.full[cursor_.slot()]; }
  FM_DEVICE void advance() { cursor_.advance(); }

 private:
  RingBarriers<kSlots>& barriers_;
  RingCursor<kSlots> cursor_;
};

// A math warpgroup's end. The pair's copies are multicast, so a stage is released to both CTAs.
template <int kSlots>
class StageReader {
 public:
  FM_DEVICE explicit StageReader(RingBarriers<kSlots>& barriers) : barriers_(barriers) {}

  FM_DEVICE void wait(Waiter& waiter) {
    waiter.wait(&barriers_.full[cursor_.slot()], cursor_.parity(), WaitTag::kStageFull);
  }
  FM_DEVICE int slot() const { return cursor_.slot(); }
  FM_DEVICE void advance() { cursor_.advance(); }
  // Passes over the stages that the other warpgroup reads.
  FM_DEVICE void skip(int num_stages) { cursor_.skip(num_stages); }
  FM_DEVICE RingCursor<kSlots>& cursor() { return cursor_; }
  // Whole warp, after its last read of the slot.
  FM_DEVICE void release(int slot) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kReleases) ptx::mbarrier_arrive_cluster_default(&barriers_.empty[slot], lane);
  }

 private:
  static constexpr uint32_t kReleases = 2;  // CTAs of the pair
  RingBarriers<kSlots>& barriers_;
  RingCursor<kSlots> cursor_;
};

// Messages of 16 bytes from one warp of the pair's leader (rank 0) to roles of both CTAs.
// `empty` is the leader's: it counts the readers of the whole pair. `full` is each CTA's own; its
// bytes are announced in advance, by init() and then by the one reader that calls rearm().
template <class Message, int kSlots>
struct MessageRing {
  static_assert(sizeof(Message) == 16);
  alignas(16) Message messages[kSlots];
  RingBarriers<kSlots> barriers;

  FM_DEVICE void init(int num_readers) {
    barriers.init(num_readers);
    for (int slot = 0; slot < kSlots; ++slot) announce(slot);
  }
  FM_DEVICE void announce(int slot) {
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &barriers.full[slot], sizeof(Message));
  }
};

// The sending warp's end: all lanes wait, lane 0 sends.
template <class Message, int kSlots>
class MessageWriter {
 public:
  FM_DEVICE explicit MessageWriter(MessageRing<Message, kSlots>& ring) : ring_(ring) {}

  FM_DEVICE void send(const Message& message, Waiter& waiter) {
    const int slot = cursor_.slot();
    waiter.wait(&ring_.barriers.empty[slot], cursor_.parity() ^ 1, WaitTag::kTileEmpty);
    // Else a lane might look after this message has been read: at the phase after the one that it
    // waits for.
    __syncwarp();
    if (threadIdx.x % 32 < 2) {
      ptx::st_async_16(&ring_.messages[slot], as_int4(message), &ring_.barriers.full[slot],
                       threadIdx.x % 32);
    }
    cursor_.advance();
  }

 private:
  FM_DEVICE static int4 as_int4(const Message& message) {
    return *reinterpret_cast<const int4*>(&message);
  }
  MessageRing<Message, kSlots>& ring_;
  RingCursor<kSlots> cursor_;
};

// A reading warp's end (every lane calls), or a single thread's (`rearm` by exactly one a CTA).
template <class Message, int kSlots>
class MessageReader {
 public:
  FM_DEVICE explicit MessageReader(MessageRing<Message, kSlots>& ring) : ring_(ring) {}

  // The next message, which stays in the ring.
  FM_DEVICE Message peek(Waiter& waiter) {
    waiter.wait(&ring_.barriers.full[cursor_.slot()], cursor_.parity(), WaitTag::kTileFull);
    return ring_.messages[cursor_.slot()];
  }
  // The next message, taken out by a whole warp.
  FM_DEVICE Message take(Waiter& waiter) {
    const Message message = peek(waiter);
    __syncwarp();
    release(threadIdx.x % 32 == 0);
    return message;
  }
  // The same by one thread.
  FM_DEVICE Message take_alone(Waiter& waiter) {
    const Message message = peek(waiter);
    release(true);
    return message;
  }
  // The same, and announces the slot's next contents.
  FM_DEVICE Message take_and_rearm(Waiter& waiter) {
    const Message message = peek(waiter);
    ring_.announce(cursor_.slot());
    release(true);
    return message;
  }
  FM_DEVICE RingCursor<kSlots>& cursor() { return cursor_; }

 private:
  FM_DEVICE void release(bool arrives) {
    if (arrives) ptx::mbarrier_arrive_cluster_default(&ring_.barriers.empty[cursor_.slot()], 0);
    cursor_.advance();
  }
  MessageRing<Message, kSlots>& ring_;
  RingCursor<kSlots> cursor_;
};

}  // namespace flashmoe::cuda::sync
