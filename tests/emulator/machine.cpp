#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "sanitizers.h"

namespace flashmoe::emulator {
namespace {

uint64_t number_of(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (end == text || *end != '\0') {
    throw std::runtime_error(std::string(name) + " is '" + text + "', expected a whole number");
  }
  return value;
}

Machine read_machine() {
  const Machine found{.num_devices = static_cast<int>(number_of("FLASHMOE_EMULATED_GPUS", 1)),
                      .num_sms = static_cast<int>(number_of("FLASHMOE_EMULATED_SMS", 4)),
                      .seed = number_of("FLASHMOE_EMULATED_SEED", 0)};
  if (found.num_devices < 0 || found.num_devices > kMaxDevices) {
    throw std::runtime_error("FLASHMOE_EMULATED_GPUS: expected 0 to " +
                             std::to_string(kMaxDevices));
  }
  if (found.num_sms < 2 || found.num_sms % 2 != 0) {
    throw std::runtime_error("FLASHMOE_EMULATED_SMS: expected an even number from 2 on");
  }
  return found;
}

struct Allocation {
  void* base;
  std::size_t length;
};

struct Memory {
  std::mutex mutex;
  std::map<void*, Allocation> allocations;
};

// Threads of streams may still run when static objects are destroyed.
Memory& memory() {
  static auto* const made = new Memory;
  return *made;
}

std::size_t rounded(std::size_t bytes, std::size_t step) {
  return (bytes + step - 1) / step * step;
}

}  // namespace

const Machine& machine() {
  static const Machine found = read_machine();
  return found;
}

std::shared_ptr<Queue> Queue::start() {
  auto queue = std::make_shared<Queue>();
  std::thread([queue]() noexcept { queue->run(); }).detach();
  return queue;
}

void Queue::add(std::function<void()> operation) {
  const std::lock_guard lock(mutex_);
  operations_.push_back(std::move(operation));
  changed_.notify_one();
}

Queue::End Queue::end() {
  auto ended = std::make_shared<std::promise<Time>>();
  End end = ended->get_future().share();
  add([ended] { ended->set_value(std::chrono::steady_clock::now()); });
  return end;
}

void Queue::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  changed_.notify_one();
}

void Queue::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return is_closed_ || !operations_.empty(); });
    if (operations_.empty()) return;
    const std::function<void()> operation = std::move(operations_.front());
    operations_.pop_front();
    lock.unlock();
    operation();
    lock.lock();
  }
}

void* take_memory(std::size_t bytes) {
  constexpr std::size_t kAlignment = 256;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (bytes == 0 || bytes > kMemoryBytes) return nullptr;
  const std::size_t used = rounded(bytes, kAlignment), accessible = rounded(used, page);
  void* base = mmap(nullptr, accessible + page, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  if (mprotect(base, accessible, PROT_READ | PROT_WRITE) != 0) {
    munmap(base, accessible + page);
    return nullptr;
  }
  void* given = static_cast<char*>(base) + (accessible - used);
  std::memset(given, kPoison, used);
  forbid(base, accessible - used);
  forbid(static_cast<char*>(given) + bytes, used - bytes);
  const std::lock_guard lock(memory().mutex);
  memory().allocations[given] = {base, accessible + page};
  return given;
}

bool release_memory(void* given) {
  const std::lock_guard lock(memory().mutex);
  const auto found = memory().allocations.find(given);
  if (found == memory().allocations.end()) return false;
  allow(found->second.base, found->second.length);
  munmap(found->second.base, found->second.length);
  memory().allocations.erase(found);
  return true;
}

}  // namespace flashmoe::emulator
