#include "cpu/pool.h"

#include <unistd.h>

namespace flashmoe::cpu {

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  if (owner_process_ != getpid()) {
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::grow(int num_workers) {
  if (owner_process_ != getpid()) {
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    owner_process_ = getpid();
  }
  while (static_cast<int>(workers_.size()) < num_workers) {
    const int thread_idx = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back(&ThreadPool::loop, this, thread_idx, generation_);
  }
}

void ThreadPool::run(int num_threads, const std::function<void(int)>& work) {
  grow(num_threads - 1);
  {
    std::lock_guard lock(mutex_);
    work_ = &work;
    active_ = num_threads;
    running_ = num_threads - 1;
    ++generation_;
  }
  wake_.notify_all();
  work(0);
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return running_ == 0; });
}

void ThreadPool::loop(int thread_idx, uint64_t generation) {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || generation_ != generation; });
    if (stopping_) return;
    generation = generation_;
    if (thread_idx >= active_) continue;
    const auto* work = work_;
    lock.unlock();
    (*work)(thread_idx);
    lock.lock();
    if (--running_ == 0) finished_.notify_one();
  }
}

}  // namespace flashmoe::cpu
