#include "cuda/engine/workspace.h"

#include <algorithm>
#include <sstream>

#include "cuda/launch/backward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/forward.h"

namespace flashmoe::cuda {
namespace {

using launch::check;

int num_sms_of(int32_t device) {
  launch::check_device(device);
  return launch::attribute_of(device, cudaDevAttrMultiProcessorCount);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusInvalidated) {
    fail(FM_INVALID_VALUE, "stream is in a graph capture that has failed; end it first");
  }
  return status == cudaStreamCaptureStatusActive;
}

unsigned long long id_of(cudaStream_t stream) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  return id;
}

uint64_t nanoseconds(double seconds) {
  constexpr double kMost = 1e18;  // 30 years
  return seconds > 0 ? static_cast<uint64_t>(std::min(seconds * 1e9, kMost)) : ~uint64_t{0};
}

[[noreturn]] void refuse_to_grow() {
  fail(
      FM_INVALID_VALUE,
      "the stream is being captured, and scratch for this layer has still to be allocated: run the "
      "layer once at this size before capturing it");
}

fm_status status_of(sync::WaitTag tag) {
  switch (tag) {
    case sync::WaitTag::kUndefinedLogits:
    case sync::WaitTag::kUndefinedBias:
    case sync::WaitTag::kInvalidId:
      return FM_ROUTING;
    default:
      return FM_TIMEOUT;
  }
}

// What the launch left behind, for people.
std::string describe(const sync::WaitReport& report, int32_t device) {
  const auto tag = static_cast<sync::WaitTag>(report.tag);
  std::ostringstream text;
  text << "an earlier launch on CUDA device " << device << " failed, its outputs are not valid: ";
  if (tag == sync::WaitTag::kUndefinedBias) {
    text << sync::name_of(tag) << " (expert " << report.block_idx << ")";
  } else if (status_of(tag) == FM_ROUTING) {
    const bool of_caller = tag == sync::WaitTag::kInvalidId;
    text << (of_caller ? "topk_ids: " : "") << sync::name_of(tag) << " (first seen in token "
         << report.block_idx << ")";
  } else {
    text << "a wait ran out of time: " << sync::name_of(tag) << " (block " << report.block_idx
         << ", thread " << report.thread_idx << ", expected count or parity " << report.parity
         << ")";
  }
  return text.str();
}

// Throws FM_OUT_OF_MEMORY when the device has not that much.
void* allocate(int64_t bytes, int32_t device) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    fail(FM_OUT_OF_MEMORY, "device ", device, " has no ", bytes, " bytes for scratch (",
         cudaGetErrorString(status),
         "): use fewer tokens, or give memory back (torch.cuda.empty_cache())");
  }
  check(status, "cudaMalloc of ", bytes, " bytes of scratch");
  return memory;
}

}  // namespace

DeviceGuard::DeviceGuard(int32_t device) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice(", device_, ")");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

Workspace::Workspace(int32_t device, cudaStream_t stream)
    : device_(device), num_sms_(num_sms_of(device)) {
  const DeviceGuard guard(device_);
  if (is_capturing(stream)) refuse_to_grow();
  try {
    check(cudaHostAlloc(&report_, sizeof(*report_), cudaHostAllocMapped),
          "cudaHostAlloc of a launch report");
    *report_ = {};
    check(cudaHostGetDevicePointer(&device_report_, report_, 0), "cudaHostGetDevicePointer");
    check(cudaEventCreateWithFlags(&last_, cudaEventDisableTiming), "cudaEventCreate");
  } catch (const Error&) {
    release();
    throw;
  }
}

Workspace::~Workspace() { release(); }

// At the end of a process the driver may be gone before us: nothing here is checked.
void Workspace::release() noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  if (last_ != nullptr) cudaEventSynchronize(last_);
  cudaFree(scratch_.memory);
  for (const Scratch& one : retired_) cudaFree(one.memory);
  cudaFreeHost(report_);
  if (last_ != nullptr) cudaEventDestroy(last_);
  cudaSetDevice(before);
  cudaGetLastError();
}

template <class Launch>
void Workspace::run(cudaStream_t stream, int64_t scratch_bytes, const Launch& launch) {
  const bool capturing = is_capturing(stream);
  raise_report(capturing);
  reserve(scratch_bytes, stream, capturing);
  if (!capturing) follow_last(stream);
  launch();
  if (capturing) {
    scratch_.captured = true;
    return;
  }
  record_last(stream);
}

void Workspace::forward(const fm_layer& layer, const fm_forward_args& args,
                        const LaunchOptions& options) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  launch::check_supported(layer, args);
  run(stream, launch::forward_scratch_bytes(layer, args), [&] {
    launch::launch_forward({.layer = layer,
                            .operands = args,
                            .scratch = scratch_.memory,
                            .report = device_report_,
                            .timeout_ns = nanoseconds(options.timeout_seconds),
                            .max_sms = options.max_sms,
                            .stream = stream});
  });
}

void Workspace::backward(const fm_layer& layer, const fm_backward_args& args,
                         const LaunchOptions& options) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  launch::check_supported(layer, args);
  run(stream, launch::backward_scratch_bytes(layer, args), [&] {
    launch::launch_backward({.layer = layer,
                             .operands = args,
                             .scratch = scratch_.memory,
                             .report = device_report_,
                             .timeout_ns = nanoseconds(options.timeout_seconds),
                             .max_sms = options.max_sms,
                             .stream = stream});
  });
}

void Workspace::record_last(cudaStream_t stream) {
  check(cudaEventRecord(last_, stream), "cudaEventRecord");
  last_stream_ = id_of(stream);
  has_last_ = true;
}

// The scratch belongs to one launch at a time. Inside a capture there is nothing to wait for: a
// graph must not depend on what ran before it was made.
void Workspace::follow_last(cudaStream_t stream) const {
  if (!has_last_ || id_of(stream) == last_stream_) return;
  check(cudaStreamWaitEvent(stream, last_), "cudaStreamWaitEvent");
}

void Workspace::reserve(int64_t bytes, cudaStream_t stream, bool capturing) {
  if (bytes <= scratch_.bytes) return;
  if (capturing) refuse_to_grow();
  if (scratch_.captured) {
    retired_.push_back(scratch_);
  } else {
    check(cudaEventSynchronize(last_), "cudaEventSynchronize before scratch is freed");
    check(cudaFree(scratch_.memory), "cudaFree of scratch");
  }
  scratch_ = {};
  scratch_.memory = allocate(bytes, device_);
  check(cudaMemsetAsync(scratch_.memory, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
  // Known to be zero, also to a launch on another stream if this one's comes to nothing.
  record_last(stream);
  scratch_.bytes = bytes;
}

void Workspace::raise_report(bool capturing) {
  const auto tag =
      static_cast<sync::WaitTag>(*static_cast<const volatile uint32_t*>(&report_->tag));
  if (tag == sync::WaitTag::kNone) return;
  if (!capturing) {
    const DeviceGuard guard(device_);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize after a failed launch");
  }
  const sync::WaitReport found = *report_;
  if (!capturing) {
    const DeviceGuard guard(device_);
    for (const Scratch& one : retired_) {
      check(cudaMemset(one.memory, 0, static_cast<size_t>(one.bytes)), "cudaMemset");
    }
    if (scratch_.memory != nullptr) {
      check(cudaMemset(scratch_.memory, 0, static_cast<size_t>(scratch_.bytes)), "cudaMemset");
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    *report_ = {};
  }
  fail(status_of(tag), describe(found, device_));
}

std::string Workspace::explain(const fm_layer& layer, const fm_forward_args& args,
                               const LaunchOptions& options) const {
  const int32_t num_sms = options.max_sms > 0 ? std::min(options.max_sms, num_sms_) : num_sms_;
  return launch::describe_forward(layer, args, num_sms);
}

int64_t Workspace::scratch_bytes() const {
  int64_t bytes = scratch_.bytes;
  for (const Scratch& one : retired_) bytes += one.bytes;
  return bytes;
}

}  // namespace flashmoe::cuda
