#include "fibers.h"

#include <sys/mman.h>

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
// Lasts: threads of streams may run when the program ends.
Registry& registry() {
  static auto* one = new Registry;
  return *one;
}

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
    background_.push_back(std::move(operation));
  }
  void wake(Thread* thread) { ready_.push_back(thread); }
  void park();
  // First and last in a thread.
  void begin();
  [[noreturn]] void end();

  Thread* current = nullptr;
  const Launch& launch() const { return launch_; }
  void call() const { kernel_.call(params_.data()); }

 private:
  void place_ctas();
  void place_threads();
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
    thread.stack = {.bottom = stack + kGuardBytes, .bytes = kStackBytes - kGuardBytes};
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

void Scheduler::yield() {
  ready_.push_back(current);
  park();
}

// The first thread of a launch finds the caller's stack.
void Scheduler::begin() {
  enter_stack(current->stack, stack_of_caller_.bottom == nullptr ? &stack_of_caller_ : nullptr);
}

FM_SWITCHES_STACK void Scheduler::end() {
  ++num_ended_;
  Thread* to = next_if_any();
  leave_stack(nullptr, stack_of(to));
  jump_to(to);
  std::abort();  // no one comes back to a thread that has ended
}

FM_SWITCHES_STACK void Scheduler::run_threads() {
  Thread* first = next();
  leave_stack(&stack_of_caller_, first->stack);
  if (__builtin_setjmp(caller_) == 0) jump_to(first);
  enter_stack(stack_of_caller_);
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
  const std::lock_guard lock(registry().mutex);
  registry().kernels.try_emplace(function, kernel);
}
const Kernel& find_kernel(const void* function) {
  const std::lock_guard lock(registry().mutex);
  return registry().kernels.at(function);
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

void Groups::wait(std::size_t pending) {
  while (groups_.size() > pending) {
    for (const auto& operation : groups_.front()) operation();
    groups_.pop_front();
  }
}

void gather(Gathering& gathering, uint32_t count, const std::function<void()>& last) {
  if (++gathering.arrived < count) {
    gathering.waiting.push_back(&self());
    scheduler->park();
    return;
  }
  last();
  gathering.arrived = 0;
  ++gathering.generation;
  for (Thread* thread : gathering.waiting) scheduler->wake(thread);
  gathering.waiting.clear();
}

const uint32_t (*exchange(const uint32_t* words, uint32_t count))[kExchangeWords] {
  Warp& warp = self().warp();
  std::copy_n(words, count, warp.given[self().lane()]);
  gather(warp.gathering, kLanes,
         [&] { std::copy_n(&warp.given[0][0], kLanes * kExchangeWords, &warp.shown[0][0]); });
  return warp.shown;
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
