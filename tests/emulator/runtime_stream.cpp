// The CUDA runtime's functions about streams, events and launches, over machine.h.
//
// Streams that were made to be ordered with the default stream share its queue, which is one of the
// orders that CUDA allows.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#include "device.h"
#include "machine.h"

using flashmoe::emulator::Queue;

struct CUstream_st {
  int device;
  unsigned long long id;
  bool owns_queue;
  std::shared_ptr<Queue> queue;
};

struct CUevent_st {
  explicit CUevent_st(int on) : device(on) {}

  // Of the last record; not valid before the first.
  Queue::End end() {
    const std::lock_guard lock(mutex);
    return last;
  }
  void set_end(Queue::End end) {
    const std::lock_guard lock(mutex);
    last = std::move(end);
  }

  const int device;
  std::mutex mutex;
  Queue::End last;
};

namespace flashmoe::emulator {
namespace {

constexpr unsigned long long kFirstStreamId = kMaxDevices + 1;  // after the default streams'

// The queues of a device. Never destroyed: their threads may outlive static objects.
struct DeviceQueues {
  std::shared_ptr<Queue> make_default() {
    const std::lock_guard lock(mutex);
    if (of_default == nullptr) all.push_back(of_default = Queue::start());
    return of_default;
  }
  std::shared_ptr<Queue> make() {
    const std::lock_guard lock(mutex);
    std::erase_if(all, [](const std::weak_ptr<Queue>& queue) { return queue.expired(); });
    std::shared_ptr<Queue> made = Queue::start();
    all.push_back(made);
    return made;
  }
  std::vector<Queue::End> ends() {
    const std::lock_guard lock(mutex);
    std::vector<Queue::End> found;
    for (const std::weak_ptr<Queue>& one : all) {
      if (const auto queue = one.lock()) found.push_back(queue->end());
    }
    return found;
  }

  std::mutex mutex;
  std::shared_ptr<Queue> of_default;
  std::vector<std::weak_ptr<Queue>> all;
};

DeviceQueues& queues_of(int device) {
  static auto* const made = new std::array<DeviceQueues, kMaxDevices>;
  return (*made)[static_cast<std::size_t>(device)];
}

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

bool has_ended(const Queue::End& end) {
  return !end.valid() || end.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

// The dynamic shared memory that each kernel may have.
class SharedLimits {
 public:
  void set(const void* function, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    limits_[function] = bytes;
  }
  std::size_t of(const void* function) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    const std::lock_guard lock(mutex_);
    const auto found = limits_.find(function);
    return found != limits_.end() ? found->second : kWithoutAsking;
  }

 private:
  std::mutex mutex_;
  std::map<const void*, std::size_t> limits_;
};

SharedLimits& shared_limits() {
  static auto* const made = new SharedLimits;
  return *made;
}

struct Shape {
  uint32_t cluster = 1;
  bool cooperative = false;
};

Shape shape_of(const cudaLaunchConfig_t& config) {
  Shape shape;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      shape.cluster = attribute.val.clusterDim.x;
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      shape.cooperative = attribute.val.cooperative != 0;
    } else {
      throw std::runtime_error("a launch attribute that is not emulated");
    }
  }
  return shape;
}

bool is_flat(const dim3& size) { return size.x > 0 && size.y == 1 && size.z == 1; }

// A CTA an SM: the kernels take most of its shared memory.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const Shape& shape,
                         const void* function) {
  constexpr uint32_t kMaxThreads = 1024;
  if (!is_flat(config.gridDim) || !is_flat(config.blockDim)) return cudaErrorInvalidConfiguration;
  if (config.blockDim.x > kMaxThreads || config.blockDim.x % 32 != 0 ||
      config.gridDim.x % shape.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > shared_limits().of(function)) return cudaErrorInvalidValue;
  if (shape.cooperative && config.gridDim.x > static_cast<uint32_t>(machine().num_sms)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (device_of(config.stream) != current_device()) return cudaErrorInvalidResourceHandle;
  return cudaSuccess;
}

// Each launch has its own order of threads.
uint64_t next_seed() {
  static std::atomic<uint64_t> num_launches{0};
  return machine().seed == 0 ? 0 : machine().seed + num_launches++;
}

// The kernel behind an address, or null.
const Kernel* kernel_at(const void* function) {
  try {
    return &find_kernel(function);
  } catch (const std::out_of_range&) {
    return nullptr;
  }
}

}  // namespace

int device_of(cudaStream_t stream) {
  return is_default(stream) ? current_device() : stream->device;
}

std::shared_ptr<Queue> queue_of(cudaStream_t stream) {
  if (!is_default(stream)) return stream->queue;
  return is_device(current_device()) ? queues_of(current_device()).make_default() : nullptr;
}

void synchronize(int device) {
  for (const Queue::End& end : queues_of(device).ends()) end.wait();
}

}  // namespace flashmoe::emulator

using namespace flashmoe::emulator;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  static std::atomic<unsigned long long> next_id{kFirstStreamId};
  const int device = current_device();
  if (!is_device(device)) return remembered(cudaErrorNoDevice);
  const bool owns_queue = (flags & cudaStreamNonBlocking) != 0;
  DeviceQueues& queues = queues_of(device);
  *stream = new CUstream_st{.device = device,
                            .id = next_id++,
                            .owns_queue = owns_queue,
                            .queue = owns_queue ? queues.make() : queues.make_default()};
  return cudaSuccess;
}

// What is on its way ends by itself.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (is_default(stream)) return remembered(cudaErrorInvalidResourceHandle);
  if (stream->owns_queue) stream->queue->close();
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = is_default(stream) ? static_cast<unsigned long long>(current_device()) + 1 : stream->id;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const auto queue = queue_of(stream);
  if (queue == nullptr) return remembered(cudaErrorNoDevice);
  queue->end().wait();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  const auto queue = queue_of(stream);
  if (queue == nullptr || event == nullptr) return remembered(cudaErrorInvalidResourceHandle);
  const Queue::End end = event->end();
  if (end.valid()) queue->add([end] { end.wait(); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  if (!is_device(current_device())) return remembered(cudaErrorNoDevice);
  *event = new CUevent_st(current_device());
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const auto queue = queue_of(stream);
  if (queue == nullptr || event == nullptr || event->device != device_of(stream)) {
    return remembered(cudaErrorInvalidResourceHandle);
  }
  event->set_end(queue->end());
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return remembered(has_ended(event->end()) ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Queue::End end = event->end();
  if (end.valid()) end.wait();
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  *attributes = {};
  return remembered(kernel_at(function) != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (kernel_at(function) == nullptr) return remembered(cudaErrorInvalidDeviceFunction);
  const bool is_known = which == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!is_known || value < 0 || static_cast<std::size_t>(value) > kSharedLimit) {
    return remembered(cudaErrorInvalidValue);
  }
  shared_limits().set(function, static_cast<std::size_t>(value));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const Shape shape = shape_of(*config);
  const cudaError_t status = check_launch(*config, shape, function);
  if (status != cudaSuccess) return remembered(status);
  *clusters = machine().num_sms / static_cast<int>(shape.cluster);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** parameters) {
  const Kernel* kernel = kernel_at(function);
  if (kernel == nullptr) return remembered(cudaErrorInvalidDeviceFunction);
  const Shape shape = shape_of(*config);
  const cudaError_t status = check_launch(*config, shape, function);
  if (status != cudaSuccess) return remembered(status);
  const auto* bytes = static_cast<const std::byte*>(parameters[0]);
  Launch launch{.grid = config->gridDim.x,
                .block = config->blockDim.x,
                .cluster = shape.cluster,
                .shared_bytes = config->dynamicSmemBytes,
                .function = function,
                .params = {bytes, bytes + kernel->params_bytes},
                .seed = next_seed()};
  queue_of(config->stream)->add([launch = std::move(launch)] { run(launch); });
  return cudaSuccess;
}

}  // extern "C"
