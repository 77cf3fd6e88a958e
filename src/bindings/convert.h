// Python values to the structs of the C ABI and back. Throws tvm::ffi::Error, which the Python side
// receives as the exception class named by its kind.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <string>

#include "flashmoe/c_api.h"

namespace flashmoe::bindings {

using ValueMap = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

// Kinds without a dot are Python's own classes; the others are registered by flashmoe._core.
[[noreturn]] void raise(const char* kind, const std::string& message);

// Throws the exception of a status that is not FM_OK, with the text of fm_last_error().
void check(fm_status status);

fm_layer to_layer(const ValueMap& values);
// stream: a cudaStream_t as a number, for tensors on a CUDA device.
fm_forward_args to_forward_args(const ValueMap& tensors, int64_t stream);
fm_backward_args to_backward_args(const ValueMap& tensors, int64_t stream);
ValueMap from_stats(const fm_stats& stats);

}  // namespace flashmoe::bindings
