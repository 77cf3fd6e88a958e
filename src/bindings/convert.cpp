#include "bindings/convert.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>

#include "bindings/fields.h"

namespace flashmoe::bindings {
namespace {

namespace ffi = tvm::ffi;

struct DtypePair {
  DLDataType dlpack;
  fm_dtype dtype;
};

constexpr std::array kDtypes{
    DtypePair{{kDLFloat, 64, 1}, FM_F64},   DtypePair{{kDLFloat, 32, 1}, FM_F32},
    DtypePair{{kDLBfloat, 16, 1}, FM_BF16}, DtypePair{{kDLFloat, 16, 1}, FM_F16},
    DtypePair{{kDLInt, 32, 1}, FM_I32},     DtypePair{{kDLInt, 64, 1}, FM_I64},
};

// Where the data pointer of a tensor without elements points: the C ABI reads NULL as "absent".
alignas(64) std::array<char, 64> empty_storage{};

// The exception class in Python of each fm_status, in the order of the enum.
constexpr std::array kErrorKinds{
    "RuntimeError",
    "ValueError",
    "TypeError",
    "flashmoe.RoutingError",
    "flashmoe.RankMismatchError",
    "flashmoe.WaitTimeoutError",
    "flashmoe.GroupAbortedError",
    "flashmoe.OutOfMemoryError",
    "flashmoe.UnsupportedError",
    "flashmoe.FlashMoEError",
    "flashmoe.FlashMoEError",
};
static_assert(kErrorKinds.size() == FM_VERSION_MISMATCH + 1);

int32_t to_dtype(std::string_view name, DLDataType given) {
  for (const DtypePair& pair : kDtypes) {
    if (pair.dlpack.code == given.code && pair.dlpack.bits == given.bits &&
        pair.dlpack.lanes == given.lanes) {
      return pair.dtype;
    }
  }
  raise("TypeError", std::string(name) + " has dtype " +
                         std::string(ffi::DLDataTypeToString(given)) +
                         "; accepted: float64, float32, bfloat16, float16 (ids: int32, int64)");
}

struct Device {
  int32_t type = FM_DEVICE_HOST;
  int32_t index = 0;

  bool operator==(const Device&) const = default;
  std::string name() const {
    return type == FM_DEVICE_CUDA ? "cuda:" + std::to_string(index) : std::string("cpu");
  }
};

Device to_device(std::string_view name, DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {FM_DEVICE_CUDA, device.device_id};
    default:
      raise("TypeError", std::string(name) + " is on DLPack device type " +
                             std::to_string(static_cast<int>(device.device_type)) +
                             "; accepted: cpu, cuda");
  }
}

const DLTensor& dlpack_of(std::string_view name, const ffi::Any& value) {
  // The map keeps the tensor alive.
  const auto tensor = value.as<ffi::Tensor>();
  if (!tensor) {
    raise("TypeError", std::string(name) + " is " + value.GetTypeKey() + ", expected a tensor");
  }
  return *tensor->GetDLTensorPtr();
}

fm_tensor to_tensor(std::string_view name, const DLTensor& given) {
  fm_tensor out{};
  if (given.ndim > static_cast<int32_t>(std::size(out.shape))) {
    raise("ValueError", std::string(name) + " has " + std::to_string(given.ndim) +
                            " dimensions; at most 3 are accepted");
  }
  out.dtype = to_dtype(name, given.dtype);
  out.ndim = given.ndim;
  const bool is_empty =
      std::find(given.shape, given.shape + given.ndim, 0) != given.shape + given.ndim;
  // Without elements, any strides are as good as packed ones.
  const bool is_packed = given.strides == nullptr || is_empty;
  int64_t packed_stride = 1;
  for (int32_t dim = given.ndim - 1; dim >= 0; --dim) {
    out.shape[dim] = given.shape[dim];
    out.stride[dim] = is_packed ? packed_stride : given.strides[dim];
    packed_stride *= std::max<int64_t>(given.shape[dim], 1);
  }
  out.data = is_empty ? empty_storage.data() : static_cast<char*>(given.data) + given.byte_offset;
  return out;
}

template <class Fields>
auto find_field(const Fields& fields, std::string_view name, const char* what) {
  const auto found = std::find_if(fields.begin(), fields.end(),
                                  [&](const auto& field) { return field.name == name; });
  if (found == fields.end()) {
    raise("ValueError", "'" + std::string(name) + "' is not a field of " + what);
  }
  return found->member;
}

template <class Args, class Fields>
Args to_args(const ValueMap& tensors, int64_t stream, const Fields& fields, const char* what) {
  Args args{};
  args.struct_size = sizeof(Args);
  Device device;
  std::string first;
  for (const auto& [key, value] : tensors) {
    const std::string_view name(key.data(), key.size());
    const DLTensor& given = dlpack_of(name, value);
    const Device where = to_device(name, given.device);
    if (first.empty()) {
      first = name;
      device = where;
    } else if (where != device) {
      raise("TypeError", std::string(name) + " is on " + where.name() + " and " + first + " on " +
                             device.name() + "; accepted: all on one device");
    }
    args.*find_field(fields, name, what) = to_tensor(name, given);
  }
  args.device_type = device.type;
  args.device = device.index;
  args.stream = reinterpret_cast<void*>(stream);
  return args;
}

template <class Number>
void read_number(std::string_view name, const ffi::Any& value, Number& out) {
  using Wide = std::conditional_t<std::is_floating_point_v<Number>, double, int64_t>;
  const auto given = value.try_cast<Wide>();
  if (!given) {
    raise("TypeError", std::string(name) + " is " + value.GetTypeKey() + ", expected " +
                           (std::is_floating_point_v<Number> ? "a number" : "an integer"));
  }
  out = static_cast<Number>(*given);
  if (static_cast<Wide>(out) != *given && *given == *given) {
    raise("ValueError", std::string(name) + " is " + std::to_string(*given) + ", out of range");
  }
}

}  // namespace

void raise(const char* kind, const std::string& message) { throw ffi::Error(kind, message, ""); }

void check(fm_status status) {
  if (status == FM_OK) return;
  const auto kind_idx = std::min<size_t>(status, FM_VERSION_MISMATCH);
  raise(kErrorKinds[kind_idx], fm_last_error());
}

fm_layer to_layer(const ValueMap& values) {
  fm_layer layer{};
  layer.struct_size = sizeof(layer);
  for (const auto& [key, value] : values) {
    const std::string_view name(key.data(), key.size());
    const auto member = find_field(kLayerFields, name, "fm_layer");
    std::visit([&, &number = value](auto field) { read_number(name, number, layer.*field); },
               member);
  }
  return layer;
}

fm_forward_args to_forward_args(const ValueMap& tensors, int64_t stream) {
  return to_args<fm_forward_args>(tensors, stream, kForwardFields, "fm_forward_args");
}

fm_backward_args to_backward_args(const ValueMap& tensors, int64_t stream) {
  return to_args<fm_backward_args>(tensors, stream, kBackwardFields, "fm_backward_args");
}

ValueMap from_stats(const fm_stats& stats) {
  ValueMap out;
  for (const auto& field : kStatsFields) {
    std::visit(
        [&](auto member) {
          using Number = std::remove_cvref_t<decltype(stats.*member)>;
          using Wide = std::conditional_t<std::is_floating_point_v<Number>, double, int64_t>;
          out.Set(ffi::String(std::string(field.name)), static_cast<Wide>(stats.*member));
        },
        field.member);
  }
  const auto list = [](const auto& values) {
    return ffi::Array<double>(std::begin(values), std::end(values));
  };
  out.Set("phase_seconds", list(stats.phase_seconds));
  out.Set("phase_flops", list(stats.phase_flops));
  return out;
}

}  // namespace flashmoe::bindings
