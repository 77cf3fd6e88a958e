// The TVM-FFI module of FlashMoE: the C ABI under names and types that Python understands.
//
// Groups and layers are handles: small numbers that stay valid, or fail with a text, whatever
// Python does with them. A launch holds a reference to its group, so that closing a group while
// another thread runs a launch on it is safe.
#include <pthread.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "bindings/convert.h"
#include "flashmoe/c_api.h"

namespace flashmoe::bindings {
namespace {

namespace ffi = tvm::ffi;

using GroupRef = std::shared_ptr<std::remove_pointer_t<fm_group>>;

struct Handles {
  std::mutex mutex;
  int64_t next_group = 1;
  std::unordered_map<int64_t, GroupRef> groups;
  std::vector<fm_layer> layers;
};

// Never destroyed: threads may still be in a launch when the process exits. A fork waits until no
// thread has the lock, so that the child does not inherit it locked.
Handles& handles() {
  static Handles* const instance = [] {
    auto* made = new Handles;
    pthread_atfork([] { handles().mutex.lock(); }, [] { handles().mutex.unlock(); },
                   [] { handles().mutex.unlock(); });
    return made;
  }();
  return *instance;
}

// What the last group that this thread destroyed had still to report.
thread_local fm_status destroyed = FM_OK;

int64_t add_group(fm_group group) {
  std::lock_guard lock(handles().mutex);
  const int64_t handle = handles().next_group++;
  handles().groups.emplace(
      handle, GroupRef(group, [](fm_group last) { destroyed = fm_group_destroy(last); }));
  return handle;
}

GroupRef group_of(int64_t handle) {
  std::lock_guard lock(handles().mutex);
  const auto found = handles().groups.find(handle);
  if (found == handles().groups.end()) {
    raise("ValueError", "group handle " + std::to_string(handle) + " is closed or was never made");
  }
  return found->second;
}

fm_layer layer_of(int64_t handle) {
  std::lock_guard lock(handles().mutex);
  if (handle < 0 || handle >= static_cast<int64_t>(handles().layers.size())) {
    raise("ValueError", "layer handle " + std::to_string(handle) + " was never made");
  }
  return handles().layers[handle];
}

// Layers are never freed: the Python side makes one per configuration and keeps it.
int64_t layer_create(const ValueMap& values) {
  const fm_layer layer = to_layer(values);
  std::lock_guard lock(handles().mutex);
  handles().layers.push_back(layer);
  return static_cast<int64_t>(handles().layers.size()) - 1;
}

int64_t group_self() {
  fm_group group = nullptr;
  check(fm_group_create_self(&group));
  return add_group(group);
}

ffi::Array<int64_t> group_local(int64_t world) {
  if (world < 1 || world > 4096) {
    raise("ValueError", "world is " + std::to_string(world) + "; accepted: 1 to 4096");
  }
  std::vector<fm_group> groups(world);
  check(fm_group_create_local(static_cast<int32_t>(world), groups.data()));
  ffi::Array<int64_t> out;
  for (fm_group group : groups) out.push_back(add_group(group));
  return out;
}

int64_t group_shm(const ffi::String& token, int32_t rank, int32_t world) {
  fm_group group = nullptr;
  check(fm_group_create_shm(token.c_str(), rank, world, &group));
  return add_group(group);
}

void group_destroy(int64_t handle) {
  GroupRef last = group_of(handle);
  {
    std::lock_guard lock(handles().mutex);
    handles().groups.erase(handle);
  }
  destroyed = FM_OK;
  last.reset();  // unless a launch of another thread goes on
  check(destroyed);
}

ffi::Array<int64_t> group_rank(int64_t handle) {
  int32_t rank = 0;
  int32_t world = 0;
  check(fm_group_rank(group_of(handle).get(), &rank, &world));
  return {rank, world};
}

void group_abort(int64_t handle, const ffi::String& reason) {
  check(fm_group_abort(group_of(handle).get(), reason.c_str()));
}

void group_refuse(int64_t handle, const ffi::String& reason) {
  check(fm_group_refuse(group_of(handle).get(), reason.c_str()));
}

void group_set(int64_t handle, const ffi::String& key, double value) {
  check(fm_group_set(group_of(handle).get(), key.c_str(), value));
}

void group_reserve(int64_t handle, int64_t max_tokens, int64_t hidden, int64_t top_k,
                   int64_t num_experts) {
  const fm_capacity capacity{sizeof(fm_capacity), 0, max_tokens, hidden, top_k, num_experts};
  check(fm_group_reserve(group_of(handle).get(), &capacity));
}

ffi::Array<double> measure_link(int32_t device, int32_t peer) {
  double bytes_per_second = 0;
  double flag_seconds = 0;
  check(fm_measure_link(device, peer, &bytes_per_second, &flag_seconds));
  return {bytes_per_second, flag_seconds};
}

ValueMap group_stats(int64_t handle) {
  fm_stats stats{};
  stats.struct_size = sizeof(stats);
  check(fm_group_stats(group_of(handle).get(), &stats));
  return from_stats(stats);
}

// A launch whose operands cannot be converted still takes part, so that the peers fail at once.
template <class Convert>
auto convert_or_refuse(fm_group group, const Convert& convert) {
  try {
    return convert();
  } catch (const ffi::Error& error) {
    fm_group_refuse(group, error.message().c_str());
    throw;
  }
}

void forward(int64_t group_handle, int64_t layer_handle, const ValueMap& tensors, int64_t stream) {
  const GroupRef group = group_of(group_handle);
  const fm_layer layer = layer_of(layer_handle);
  const fm_forward_args args =
      convert_or_refuse(group.get(), [&] { return to_forward_args(tensors, stream); });
  check(fm_forward(group.get(), &layer, &args));
}

void backward(int64_t group_handle, int64_t layer_handle, const ValueMap& tensors, int64_t flags,
              int64_t stream) {
  const GroupRef group = group_of(group_handle);
  const fm_layer layer = layer_of(layer_handle);
  fm_backward_args args =
      convert_or_refuse(group.get(), [&] { return to_backward_args(tensors, stream); });
  args.flags = static_cast<uint32_t>(flags);
  check(fm_backward(group.get(), &layer, &args));
}

ffi::String explain(int64_t group_handle, int64_t layer_handle, const ValueMap& tensors) {
  const GroupRef group = group_of(group_handle);
  const fm_layer layer = layer_of(layer_handle);
  const fm_forward_args args = to_forward_args(tensors, 0);
  const char* text = nullptr;
  check(fm_explain(group.get(), &layer, &args, &text));
  return text;
}

int64_t z_rows(int64_t group_handle, int64_t layer_handle, int64_t tokens) {
  const fm_layer layer = layer_of(layer_handle);
  int64_t rows = 0;
  check(fm_z_rows(group_of(group_handle).get(), &layer, tokens, &rows));
  return rows;
}

ffi::String version() { return fm_version(); }

ffi::String build_info() { return fm_build_info(); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_create, layer_create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_self, group_self);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_local, group_local);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_shm, group_shm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_destroy, group_destroy);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_rank, group_rank);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_abort, group_abort);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_refuse, group_refuse);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_set, group_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_reserve, group_reserve);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_stats, group_stats);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(measure_link, measure_link);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward, backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain, explain);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(z_rows, z_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(build_info, build_info);

}  // namespace flashmoe::bindings
