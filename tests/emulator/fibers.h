// The threads of a launch: fibers, and what their warps, CTAs and clusters share.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "device.h"
#include "sanitizers.h"

namespace flashmoe::emulator {

inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kExchangeWords = 8;

struct Thread;

// Where __builtin_setjmp() keeps a place. Unlike longjmp(), its counterpart is not taken by a
// sanitizer for the end of all that is on the stack.
using JumpBuffer = void* [5];

// Threads that wait until as many have come.
struct Gathering {
  uint32_t arrived = 0;
  uint32_t generation = 0;
  std::vector<Thread*> waiting;
  // Where those of a generation release, and acquire: nobody arrives at the next but one before
  // all have left.
  char order[2];

  const void* order_of(uint32_t which) const { return &order[which % 2]; }
};
enum class Order { kNone, kMemory };

struct Warp {
  Gathering gathering;
  // What lanes show each other: collected, then shown to all until the next exchange is complete.
  uint32_t given[kLanes][kExchangeWords];
  uint32_t shown[kLanes][kExchangeWords];
};

// A barrier of the CTA, with votes.
struct Barrier {
  Gathering gathering;
  uint32_t votes = 0;
  uint32_t result = 0;
};

struct Cta {
  uint32_t idx = 0;
  uint32_t rank = 0;  // in its cluster
  struct Cluster* cluster = nullptr;
  std::byte* shared = nullptr;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
};

struct Cluster {
  std::vector<Cta*> ctas;
  Gathering gathering;
};

// Groups of operations that a thread has started and that end when it waits for them, or with it.
// They are seen when they end, as the thread's own; who adds one says what it will access.
class Groups {
 public:
  void add(std::function<void()> operation);
  void commit();
  // Ends all groups but the last `pending`.
  void wait(std::size_t pending);

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

struct Thread {
  uint32_t idx = 0;  // in its CTA
  Cta* cta = nullptr;
  JumpBuffer context;
  ucontext_t start;
  Stack stack;
  bool has_started = false;
  uint32_t cluster_generation = 0;
  Groups loads;     // cp.async
  Groups reads;     // stores of the copy engine: their reading of shared memory
  Groups writes;    // and their writing
  Groups products;  // wgmma
  Actor copies;     // what others do for this thread, until a barrier counts it
  Actor fenced;     // the thread as it was at its last fence

  uint32_t lane() const { return idx % kLanes; }
  Warp& warp() const { return cta->warps[idx / kLanes]; }
};

// The thread that runs now, and its launch. Of the calling OS thread.
Thread& self();
const Launch& launch();

// Lets others run. Any thread that waits for something calls it in a loop.
void yield();

// Shows the words of all lanes to all lanes. The answer lasts until the warp's next exchange.
const uint32_t (*exchange(const uint32_t* words, uint32_t count,
                          Order order = Order::kNone))[kExchangeWords];

// Returns when `num_threads` threads of the CTA have come to the barrier: how many of them vote.
uint32_t sync_threads(uint32_t barrier_idx, uint32_t num_threads, bool vote);

// All threads of the cluster; a thread waits for what it arrived at last.
void arrive_at_cluster();
void wait_for_cluster();

// An operation that ends by itself, at a time that nobody knows. It is not seen: who starts it says
// what it accesses.
void start_background(std::function<void()> operation);

// What a copy that a barrier will count accesses.
struct Access {
  void* memory;
  std::size_t bytes;
  bool is_write;
};
// A copy of `accesses` that this thread starts now: it comes after what the thread has done until
// now, and before those who acquire at `order`.
void see_copy(const std::vector<Access>& accesses, const void* order);

void fence();
// Before a relaxed store of the thread: it publishes what the thread had done at its last fence.
void release_since_fence(const void* word);

// The same place in the shared memory of a CTA of this thread's cluster.
std::byte* shared_of(const void* own, uint32_t cta_rank);
std::byte* at_shared(uint32_t address);
uint32_t shared_address_of(const void* pointer);

}  // namespace flashmoe::emulator
