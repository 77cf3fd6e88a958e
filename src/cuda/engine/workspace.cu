#include "cuda/engine/workspace.h"

#include <algorithm>

#include "cuda/fabric/rank_memory.h"
#include "cuda/launch/backward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"
#include "cuda/launch/forward_times.h"
#include "cuda/sync/holder.h"

namespace flashmoe::cuda {
namespace {

using launch::check;
using launch::DeviceGuard;

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

RankNeeds needs_of(const fm_layer& layer, const fm_forward_args& args, int32_t world) {
  return {.tokens = args.x.shape[0],
          .hidden = layer.hidden,
          .top_k = layer.top_k,
          .local_experts = layer.num_experts / world};
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

void Workspace::forward(const fm_layer& layer, const fm_forward_args& args,
                        const LaunchOptions& options, const RankView& view) {
  const DeviceGuard guard(device_);
  const bool capturing = is_capturing(static_cast<cudaStream_t>(args.stream));
  if (!has_report()) {
    launch(layer, args, options, view, capturing);
    return;
  }
  const bool harmless = is_harmless(static_cast<sync::WaitTag>(report_->tag));
  const Error found = take_report(view, capturing);
  if (!harmless) throw found;
  if (view.world() > 1) launch(layer, args, options, view, capturing);
  throw HarmlessError(found.status(), found.what());
}

void Workspace::launch(const fm_layer& layer, const fm_forward_args& args,
                       const LaunchOptions& options, const RankView& view, bool capturing) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  launch::check_supported(layer, args);
  launch::RankArguments ranks;
  ranks.rank = view.rank;
  ranks.world = view.world();
  std::shared_ptr<RankMemory> memory;
  if (view.ranks != nullptr) {
    memory = view.ranks->memory({view.rank, device_, options.max_sms, capturing},
                                needs_of(layer, args, ranks.world));
    ranks.capacity = memory->capacity();
    ranks.regions = memory->regions();
    launch::check_supported(layer, args, ranks);
  }
  begin_launch(launch::forward_scratch_bytes(layer, args, ranks), stream, options, capturing);
  launch::launch_forward({.layer = layer,
                          .operands = args,
                          .scratch = scratch_.memory,
                          .report = device_report_,
                          .timeout_ns = nanoseconds(options.timeout_seconds),
                          .max_sms = options.max_sms,
                          .ranks = ranks,
                          .launch_id = launch_id_,
                          .stream = stream});
  if (capturing && memory != nullptr) memory->keep();
  end_launch(stream, capturing);
}

void Workspace::backward(const fm_layer& layer, const fm_backward_args& args,
                         const LaunchOptions& options) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const bool capturing = is_capturing(stream);
  if (has_report()) throw take_report({}, capturing);
  launch::check_supported(layer, args);
  begin_launch(launch::backward_scratch_bytes(layer, args), stream, options, capturing);
  launch::launch_backward({.layer = layer,
                           .operands = args,
                           .scratch = scratch_.memory,
                           .report = device_report_,
                           .timeout_ns = nanoseconds(options.timeout_seconds),
                           .max_sms = options.max_sms,
                           .launch_id = launch_id_,
                           .stream = stream});
  end_launch(stream, capturing);
}

// Makes room and puts the launch behind those before it.
void Workspace::begin_launch(int64_t scratch_bytes, cudaStream_t stream,
                             const LaunchOptions& options, bool capturing) {
  reserve(scratch_bytes, stream, capturing);
  if (!capturing) follow_last(stream);
  timeout_seconds_ = options.timeout_seconds;
  launch_id_ = sync::next_holder(launch_id_);
}
void Workspace::end_launch(cudaStream_t stream, bool capturing) {
  if (capturing) {
    scratch_.captured = true;
  } else {
    record_last(stream);
  }
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

void Workspace::finish(const RankView& view) {
  if (has_last_) check(cudaEventSynchronize(last_), "cudaEventSynchronize of the last launch");
  raise_report(view);
}

void Workspace::time_last(fm_stats& stats) const {
  if (scratch_.memory == nullptr) return;
  const DeviceGuard guard(device_);
  launch::time_forward(scratch_.memory, stats);
}

bool Workspace::has_report() const {
  return *static_cast<const volatile uint32_t*>(&report_->tag) != 0;
}

void Workspace::raise_report(const RankView& view) {
  if (!has_report()) return;
  const DeviceGuard guard(device_);
  const bool harmless = is_harmless(static_cast<sync::WaitTag>(report_->tag));
  const Error found = take_report(view, false);
  if (harmless) throw HarmlessError(found.status(), found.what());
  throw found;
}

Error Workspace::take_report(const RankView& view, bool capturing) {
  if (!capturing) check(cudaDeviceSynchronize(), "cudaDeviceSynchronize after a failed launch");
  const sync::WaitReport found = *report_;
  if (!capturing) {
    for (const Scratch& one : retired_) {
      check(cudaMemset(one.memory, 0, static_cast<size_t>(one.bytes)), "cudaMemset");
    }
    if (scratch_.memory != nullptr) {
      check(cudaMemset(scratch_.memory, 0, static_cast<size_t>(scratch_.bytes)), "cudaMemset");
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    *report_ = {};
  }
  const ReportPlace place{device_, view.rank, view.world(), timeout_seconds_};
  return Error(status_of(static_cast<sync::WaitTag>(found.tag)), describe(found, place));
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
