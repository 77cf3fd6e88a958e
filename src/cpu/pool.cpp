#include "cpu/pool.h"

#include <unistd.h>

namespace flashmoe::cpu {

// A fork leaves the workers behind, in whatever they did: their mutex may be held for ever, and a
// condition variable that somebody waits on cannot be destroyed. The child leaves all of it alone.
void ThreadPool::leave_after_fork() {
  if (owner_process_ == getpid()) return;
  [[maybe_unused]] const Crew* left_alone = crew_.release();
}

ThreadPool::~ThreadPool() {
  leave_after_fork();
  if (!crew_) return;
  {
    const std::lock_guard lock(crew_->mutex);
    crew_->stopping = true;
  }
  crew_->wake.notify_all();
  for (auto& worker : crew_->workers) worker.join();
}

void ThreadPool::grow(int num_workers) {
  leave_after_fork();
  if (!crew_) {
    crew_ = std::make_unique<Crew>();
    owner_process_ = getpid();
  }
  auto& workers = crew_->workers;
  while (static_cast<int>(workers.size()) < num_workers) {
    const int thread_idx = static_cast<int>(workers.size()) + 1;
    workers.emplace_back(&ThreadPool::loop, std::ref(*crew_), thread_idx, crew_->generation);
  }
}

void ThreadPool::run(int num_threads, const std::function<void(int)>& work) {
  grow(num_threads - 1);
  Crew& crew = *crew_;
  {
    const std::lock_guard lock(crew.mutex);
    crew.work = &work;
    crew.active = num_threads;
    crew.running = num_threads - 1;
    ++crew.generation;
  }
  crew.wake.notify_all();
  work(0);
  std::unique_lock lock(crew.mutex);
  crew.finished.wait(lock, [&] { return crew.running == 0; });
}

void ThreadPool::loop(Crew& crew, int thread_idx, uint64_t generation) {
  std::unique_lock lock(crew.mutex);
  while (true) {
    crew.wake.wait(lock, [&] { return crew.stopping || crew.generation != generation; });
    if (crew.stopping) return;
    generation = crew.generation;
    if (thread_idx >= crew.active) continue;
    const auto* work = crew.work;
    lock.unlock();
    (*work)(thread_idx);
    lock.lock();
    if (--crew.running == 0) crew.finished.notify_one();
  }
}

}  // namespace flashmoe::cpu
