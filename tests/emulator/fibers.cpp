#include "fibers.h"

#include <sys/mman.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

namespace flashmoe::emulator {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // most of it is never touched
constexpr std::size_t kGuardBytes = 4 << 10;
// An arrangement of shared memory as the hardware has it: its addresses fit 18 bits.
constexpr std::size_t kSharedAlignment = std::size_t{1} << 18;

struct Registry {
  std::mutex mutex;
  std::map<const void*, Kernel> kernels;
};
// Lasts: threads of streams may run when the program ends. Made before there are any.
Registry& registry = *new Registry;

// The parameters of a launch, at an address that their type accepts.
class Params {
 public:
  explicit Params(const std::vector<std::byte>& bytes)
      : memory_(static_cast<std::byte*>(std::aligned_alloc(kAlignment, round_up(bytes.size())))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    std::copy(bytes.begin(), bytes.end(), memory_.get());
  }
  const void* data() const { return memory_.get(); }

 private:
  static constexpr std::size_t kAlignment = 128;
  static std::size_t round_up(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
};

// Memory of the operating system's, given back with the object.
class Mapping {
 public:
  explicit Mapping(std::size_t bytes)
      : bytes_(bytes),
        base_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (base_ == MAP_FAILED) throw std::bad_alloc();
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(base_, bytes_); }
  std::size_t bytes() const { return bytes_; }
  std::byte* data() const { return static_cast<std::byte*>(base_); }

 private:
  std::size_t bytes_;
  void* base_;
};

// One launch on one OS thread.
class Scheduler {
 public:
  explicit Scheduler(const Launch& launch)
      : launch_(launch),
        kernel_(find_kernel(launch.function)),
        params_(launch.params),
        random_(launch.seed),
        steps_of_operation_(launch.seed == 0 ? 64 : 1u << (1 + random_() % 10)),
        stacks_(std::size_t{launch.grid} * launch.block * kStackBytes),
        shared_((launch.grid + 1) * kSharedAlignment),
        ctas_(launch.grid),
        clusters_(launch.grid / launch.cluster),
        threads_(std::size_t{launch.grid} * launch.block) {
    place_ctas();
    place_threads();
  }
  ~Scheduler() { allow(shared_.data(), shared_.bytes()); }

  void run();
  void yield();
  void start_background(std::function<void()> operation) {
    const Unseen unseen;
    background_.push_back(std::move(operation));
  }
  // Returns when `count` threads have come; last() runs in the last one, before any goes on.
  void gather(Gathering& gathering, uint32_t count, Order order, const std::function<void()>& last);
  // First and last in a thread.
  void begin();
  [[noreturn]] void end();

  Thread* current = nullptr;
  const Launch& launch() const { return launch_; }
  void call() const { kernel_.call(params_.data()); }

 private:
  void place_ctas();
  void place_threads();
  void park();
  Thread* next();
  Thread* next_if_any();
  void run_threads();
  void switch_to(Thread* thread);  // from the current one
  void jump_to(Thread* thread);
  const Stack& stack_of(const Thread* thread) const;
  void do_background();

  const Launch& launch_;
  const Kernel& kernel_;
  Params params_;
  std::minstd_rand random_;
  const uint32_t steps_of_operation_;  // between two ends of operations under way
  Mapping stacks_;
  Mapping shared_;
  std::vector<Cta> ctas_;
  std::vector<Cluster> clusters_;
  std::vector<Thread> threads_;
  std::deque<Thread*> ready_;
  std::vector<std::function<void()>> background_;
  std::size_t num_ended_ = 0;
  JumpBuffer caller_;
  Stack stack_of_caller_;
  uint32_t steps_ = 0;
};

thread_local Scheduler* scheduler = nullptr;

void Scheduler::place_ctas() {
  const auto base = reinterpret_cast<uintptr_t>(shared_.data());
  std::byte* first = shared_.data() + (kSharedAlignment - base % kSharedAlignment);
  forbid(shared_.data(), shared_.bytes());
  for (uint32_t i = 0; i < launch_.grid; ++i) {
    Cta& cta = ctas_[i];
    cta.idx = i;
    cta.rank = i % launch_.cluster;
    cta.cluster = &clusters_[i / launch_.cluster];
    cta.cluster->ctas.push_back(&cta);
    cta.shared = first + i * kSharedAlignment;
    allow(cta.shared, launch_.shared_bytes);
    std::fill_n(cta.shared, launch_.shared_bytes, std::byte{0xA5});
    cta.warps.resize(launch_.block / kLanes);
  }
}

void Scheduler::place_threads() {
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.idx = static_cast<uint32_t>(i % launch_.block);
    thread.cta = &ctas_[i / launch_.block];
    std::byte* const stack = stacks_.data() + i * kStackBytes;
    mprotect(stack, kGuardBytes, PROT_NONE);
    thread.stack.bottom = stack + kGuardBytes;
    thread.stack.bytes = kStackBytes - kGuardBytes;
    thread.stack.actor.make();
    ready_.push_back(&thread);
  }
}

void thread_main() {
  scheduler->begin();
  scheduler->call();
  Thread& thread = self();
  thread.loads.wait(0);
  thread.reads.wait(0);
  thread.writes.wait(0);
  scheduler->end();
}

// What follows is done by `actor`, which knows what this thread has done until now.
void tell(Actor& actor) {
  actor.make();
  release_at(&actor);
  actor.run();
  acquire_at(&actor);
}

// Null is the caller of the launch.
const Stack& Scheduler::stack_of(const Thread* thread) const {
  return thread != nullptr ? thread->stack : stack_of_caller_;
}

FM_SWITCHES_STACK void Scheduler::jump_to(Thread* thread) {
  current = thread;
  if (thread == nullptr) __builtin_longjmp(caller_, 1);
  if (thread->has_started) __builtin_longjmp(thread->context, 1);
  thread->has_started = true;
  getcontext(&thread->start);
  thread->start.uc_stack.ss_sp = const_cast<void*>(thread->stack.bottom);
  thread->start.uc_stack.ss_size = thread->stack.bytes;
  thread->start.uc_link = nullptr;
  makecontext(&thread->start, thread_main, 0);
  setcontext(&thread->start);
}

FM_SWITCHES_STACK void Scheduler::switch_to(Thread* thread) {
  Stack& own = current->stack;
  leave_stack(&own, stack_of(thread));
  if (__builtin_setjmp(current->context) == 0) jump_to(thread);
  enter_stack(current->stack);
}

// One of the operations under way ends now and then, and when nobody else can go on.
void Scheduler::do_background() {
  if (background_.empty()) return;
  const std::size_t which = launch_.seed == 0 ? 0 : random_() % background_.size();
  const std::function<void()> operation = std::move(background_[which]);
  background_[which] = std::move(background_.back());
  background_.pop_back();
  operation();
}

Thread* Scheduler::next() {
  constexpr uint32_t kStepsOfSlice = 1 << 16;
  if (++steps_ % steps_of_operation_ == 0 || ready_.empty()) do_background();
  if (steps_ % kStepsOfSlice == 0) std::this_thread::yield();
  if (ready_.empty()) return nullptr;
  if (launch_.seed != 0 && random_() % 4 == 0) {
    std::swap(ready_.front(), ready_[random_() % ready_.size()]);
  }
  Thread* thread = ready_.front();
  ready_.pop_front();
  return thread;
}

// Null when nobody can go on, nor will.
Thread* Scheduler::next_if_any() {
  Thread* thread = next();
  while (thread == nullptr && !background_.empty()) thread = next();
  return thread;
}

void Scheduler::park() {
  Thread* to = next_if_any();
  if (to != current) switch_to(to);
}

void Scheduler::gather(Gathering& gathering, uint32_t count, Order order,
                       const std::function<void()>& last) {
  const void* const edge = gathering.order_of(gathering.generation);
  if (order == Order::kMemory) release_at(edge);
  if (++gathering.arrived < count) {
    gathering.waiting.push_back(current);
    park();
  } else {
    last();
    gathering.arrived = 0;
    ++gathering.generation;
    for (Thread* thread : gathering.waiting) ready_.push_back(thread);
    gathering.waiting.clear();
  }
  if (order == Order::kMemory) acquire_at(edge);
}

void Scheduler::yield() {
  const Unseen unseen;
  ready_.push_back(current);
  park();
}

// The first thread of a launch finds the caller's stack.
void Scheduler::begin() {
  enter_stack(current->stack, stack_of_caller_.bottom == nullptr ? &stack_of_caller_ : nullptr);
}

FM_SWITCHES_STACK void Scheduler::end() {
  release_at(&num_ended_);
  ++num_ended_;
  Thread* const to = [this] {
    const Unseen unseen;
    return next_if_any();
  }();
  leave_stack(nullptr, stack_of(to));
  jump_to(to);
  std::abort();  // no one comes back to a thread that has ended
}

FM_SWITCHES_STACK void Scheduler::run_threads() {
  stack_of_caller_.actor.be_current();
  Thread* first = next();
  leave_stack(&stack_of_caller_, first->stack);
  if (__builtin_setjmp(caller_) == 0) jump_to(first);
  enter_stack(stack_of_caller_);
  acquire_at(&num_ended_);
}

void Scheduler::run() {
  run_threads();
  if (num_ended_ != threads_.size()) {
    throw std::runtime_error("the threads of a launch wait for each other: " +
                             std::to_string(threads_.size() - num_ended_) + " of " +
                             std::to_string(threads_.size()) + " cannot go on");
  }
}

}  // namespace

void register_kernel(const void* function, const Kernel& kernel) {
  const std::lock_guard lock(registry.mutex);
  registry.kernels.try_emplace(function, kernel);
}
const Kernel& find_kernel(const void* function) {
  const std::lock_guard lock(registry.mutex);
  return registry.kernels.at(function);
}

void run(const Launch& launch) {
  Scheduler one(launch);
  scheduler = &one;
  one.run();
  scheduler = nullptr;
}

Thread& self() { return *scheduler->current; }
const Launch& launch() { return scheduler->launch(); }
void yield() { scheduler->yield(); }
void start_background(std::function<void()> operation) {
  scheduler->start_background(std::move(operation));
}

void Groups::add(std::function<void()> operation) {
  const Unseen unseen;
  open_.push_back(std::move(operation));
}

void Groups::commit() {
  const Unseen unseen;
  groups_.push_back(std::move(open_));
  open_.clear();
}

void Groups::wait(std::size_t pending) {
  while (groups_.size() > pending) {
    for (const auto& operation : groups_.front()) operation();
    const Unseen unseen;
    groups_.pop_front();
  }
}

const uint32_t (*exchange(const uint32_t* words, uint32_t count, Order order))[kExchangeWords] {
  const Unseen unseen;
  Warp& warp = self().warp();
  std::copy_n(words, count, warp.given[self().lane()]);
  scheduler->gather(warp.gathering, kLanes, order, [&] {
    std::copy_n(&warp.given[0][0], kLanes * kExchangeWords, &warp.shown[0][0]);
  });
  return warp.shown;
}

uint32_t sync_threads(uint32_t barrier_idx, uint32_t num_threads, bool vote) {
  const Unseen unseen;
  Barrier& barrier = self().cta->barriers[barrier_idx];
  barrier.votes += vote ? 1 : 0;
  scheduler->gather(barrier.gathering, num_threads, Order::kMemory, [&] {
    barrier.result = barrier.votes;
    barrier.votes = 0;
  });
  return barrier.result;
}

void arrive_at_cluster() {
  Thread& thread = self();
  Gathering& gathering = thread.cta->cluster->gathering;
  thread.cluster_generation = gathering.generation;
  release_at(gathering.order_of(thread.cluster_generation));
  if (++gathering.arrived < launch().cluster * launch().block) return;
  gathering.arrived = 0;
  ++gathering.generation;
}
void wait_for_cluster() {
  const Thread& thread = self();
  const Gathering& gathering = thread.cta->cluster->gathering;
  while (gathering.generation == thread.cluster_generation) yield();
  acquire_at(gathering.order_of(thread.cluster_generation));
}

void see_copy(const std::vector<Access>& accesses, const void* order) {
  const Access* const all = accesses.data();
  const std::size_t count = accesses.size();
  tell(self().copies);
  for (std::size_t i = 0; i < count; ++i) {
    if (all[i].is_write) see_write(all[i].memory, all[i].bytes);
    if (!all[i].is_write) see_read(all[i].memory, all[i].bytes);
  }
  release_at(order);
  self().stack.actor.run();
}

void fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  tell(self().fenced);
  self().stack.actor.run();
}

void release_since_fence(const void* word) {
  const Actor& fenced = self().fenced;
  if (!fenced.exists()) return;
  fenced.run();
  release_at(word);
  self().stack.actor.run();
}

std::byte* shared_of(const void* own, uint32_t cta_rank) {
  const Cta& cta = *self().cta;
  return cta.cluster->ctas.at(cta_rank)->shared + (static_cast<const std::byte*>(own) - cta.shared);
}
std::byte* at_shared(uint32_t address) { return self().cta->shared + address; }
uint32_t shared_address_of(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const std::byte*>(pointer) - self().cta->shared);
}

}  // namespace flashmoe::emulator
