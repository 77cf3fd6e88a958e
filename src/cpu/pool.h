// Threads of one rank. The caller is thread 0; the others sleep between launches.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace flashmoe::cpu {

class ThreadPool {
 public:
  ThreadPool() = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work(thread_idx) on num_threads threads and returns when all have. work must not throw.
  void run(int num_threads, const std::function<void(int)>& work);

 private:
  void grow(int num_workers);
  void loop(int thread_idx, uint64_t generation);
  void stop();

  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  uint64_t generation_ = 0;
  int active_ = 0;
  int running_ = 0;
  int owner_process_ = 0;  // a fork leaves the workers behind: the child starts its own
  bool stopping_ = false;
};

}  // namespace flashmoe::cpu
