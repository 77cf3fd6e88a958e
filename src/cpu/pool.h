// Threads of one rank. The caller is thread 0; the others sleep between launches.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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
  struct Crew {
    std::mutex mutex;
    std::condition_variable wake, finished;
    std::vector<std::thread> workers;
    const std::function<void(int)>* work = nullptr;
    uint64_t generation = 0;
    int active = 0;
    int running = 0;
    bool stopping = false;
  };

  void leave_after_fork();
  void grow(int num_workers);
  static void loop(Crew& crew, int thread_idx, uint64_t generation);

  std::unique_ptr<Crew> crew_;
  int owner_process_ = 0;
};

}  // namespace flashmoe::cpu
