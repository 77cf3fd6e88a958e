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
};

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
class Groups {
 public:
  void add(std::function<void()> operation) { open_.push_back(std::move(operation)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
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

  uint32_t lane() const { return idx % kLanes; }
  Warp& warp() const { return cta->warps[idx / kLanes]; }
};

// The thread that runs now, and its launch. Of the calling OS thread.
Thread& self();
const Launch& launch();

// Lets others run. Any thread that waits for something calls it in a loop.
void yield();

// Returns when `count` threads have come; last() runs in the last one, before any goes on.
void gather(Gathering& gathering, uint32_t count, const std::function<void()>& last);

// Shows the words of all lanes to all lanes. The answer lasts until the warp's next exchange.
const uint32_t (*exchange(const uint32_t* words, uint32_t count))[kExchangeWords];

// An operation that ends by itself, at a time that nobody knows.
void start_background(std::function<void()> operation);

// The same place in the shared memory of a CTA of this thread's cluster.
std::byte* shared_of(const void* own, uint32_t cta_rank);
std::byte* at_shared(uint32_t address);
uint32_t shared_address_of(const void* pointer);

}  // namespace flashmoe::emulator
