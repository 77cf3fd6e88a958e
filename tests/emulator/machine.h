// The devices that the emulated CUDA runtime shows, their memory, and the queues of their streams.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>

namespace flashmoe::emulator {

inline constexpr int kMaxDevices = 16;
inline constexpr std::size_t kSharedLimit = 227 * 1024;  // a Hopper CTA's
inline constexpr std::size_t kMemoryBytes = std::size_t{8} << 30;

// FLASHMOE_EMULATED_GPUS (1), FLASHMOE_EMULATED_SMS (4, even) and FLASHMOE_EMULATED_SEED (0:
// threads run one after the other), read at the first call. Throws std::runtime_error for what they
// do not mean.
struct Machine {
  int num_devices;
  int num_sms;
  uint64_t seed;
};
const Machine& machine();

// Device 0 to num_devices - 1 of the calling thread.
int current_device();
bool is_device(int device);

// Operations that run one after the other on an OS thread of their own. An operation that throws
// ends the process with its text: it stands for what a GPU does to a context.
class Queue {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using End = std::shared_future<Time>;

  // The thread ends when the queue is closed and empty; it keeps the queue.
  static std::shared_ptr<Queue> start();

  void add(std::function<void()> operation);
  // When what was added so far has ended.
  End end();
  void close();

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool is_closed_ = false;
};

// The queue of a stream's handle, which may be one of CUDA's own; null if that of a device is asked
// for that does not exist.
std::shared_ptr<Queue> queue_of(cudaStream_t stream);
int device_of(cudaStream_t stream);

// Waits for all streams of the device.
void synchronize(int device);

// What a call returns, remembered for cudaGetLastError() where it is an error.
cudaError_t remembered(cudaError_t status);

// Memory that holds 0xA5 and whose end meets a page that faults: on a multiple of 256 bytes, as
// CUDA gives it. Null when there is not so much. Memory that was released faults, too.
void* take_memory(std::size_t bytes);
// False for an address that take_memory() did not give.
bool release_memory(void* memory);
inline constexpr int kPoison = 0xA5;

}  // namespace flashmoe::emulator
