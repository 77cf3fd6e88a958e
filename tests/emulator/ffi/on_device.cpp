// Puts the calls of the Python binding on emulated devices: operands in host memory are taken for
// operands on the device of the group's rank, and a call returns when its launch has ended. The
// linker leads the binding here (--wrap).
#include <cuda_runtime_api.h>

#include "flashmoe/c_api.h"

extern "C" {

fm_status __real_fm_forward(fm_group group, const fm_layer* layer, const fm_forward_args* args);
fm_status __real_fm_backward(fm_group group, const fm_layer* layer, const fm_backward_args* args);
fm_status __real_fm_explain(fm_group group, const fm_layer* layer, const fm_forward_args* args,
                            const char** text);
fm_status __real_fm_group_create_local(int32_t world, fm_group* out);

fm_status __wrap_fm_forward(fm_group group, const fm_layer* layer, const fm_forward_args* args);
fm_status __wrap_fm_backward(fm_group group, const fm_layer* layer, const fm_backward_args* args);
fm_status __wrap_fm_explain(fm_group group, const fm_layer* layer, const fm_forward_args* args,
                            const char** text);
fm_status __wrap_fm_group_create_local(int32_t world, fm_group* out);
}

namespace {

template <class Args>
Args on_device(fm_group group, const Args& args) {
  int32_t rank = 0;
  int32_t world = 1;
  fm_group_rank(group, &rank, &world);
  Args moved = args;
  moved.device_type = FM_DEVICE_CUDA;
  moved.device = rank;
  return moved;
}

// What the call has come to: its own status, or that of its launch.
fm_status finish(fm_group group, int32_t device, fm_status status) {
  if (status != FM_OK) return status;
  cudaSetDevice(device);
  cudaDeviceSynchronize();
  fm_stats stats{};
  stats.struct_size = sizeof(stats);
  return fm_group_stats(group, &stats);
}

}  // namespace

fm_status __wrap_fm_forward(fm_group group, const fm_layer* layer, const fm_forward_args* args) {
  const fm_forward_args moved = on_device(group, *args);
  return finish(group, moved.device, __real_fm_forward(group, layer, &moved));
}

fm_status __wrap_fm_backward(fm_group group, const fm_layer* layer, const fm_backward_args* args) {
  const fm_backward_args moved = on_device(group, *args);
  return finish(group, moved.device, __real_fm_backward(group, layer, &moved));
}

fm_status __wrap_fm_explain(fm_group group, const fm_layer* layer, const fm_forward_args* args,
                            const char** text) {
  const fm_forward_args moved = on_device(group, *args);
  return __real_fm_explain(group, layer, &moved, text);
}

fm_status __wrap_fm_group_create_local(int32_t world, fm_group* out) {
  fm_status status = __real_fm_group_create_local(world, out);
  for (int32_t rank = 0; world > 1 && rank < world && status == FM_OK; ++rank) {
    status = fm_group_set(out[rank], "device", rank);
  }
  return status;
}
