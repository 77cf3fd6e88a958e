// Calls whose operands are on a CUDA device.
#pragma once

#include "fabric/group.h"
#include "flashmoe/c_api.h"

namespace flashmoe::engine {

// Where the operands of a call are. Throws FM_INVALID_TYPE for a device_type that is none.
bool is_on_cuda(int32_t device_type);

// The operands as the CUDA engine takes them: checked against the layer as for the CPU
// (engine/check.h), with the strides of dimensions of size 1 made canonical. Throws
// FM_INVALID_VALUE or FM_INVALID_TYPE, and FM_UNSUPPORTED for what only the CPU engine does.
fm_forward_args make_cuda_forward(const fabric::Group& group, const fm_layer& layer,
                                  const fm_forward_args& args);
fm_backward_args make_cuda_backward(const fabric::Group& group, const fm_layer& layer,
                                    const fm_backward_args& args);

}  // namespace flashmoe::engine
