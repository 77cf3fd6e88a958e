// A tensor of the caller, in any layout that the C ABI takes.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/types.h"
#include "flashmoe/c_api.h"
#include "support.h"

namespace flashmoe::test {

enum class Order { kRowMajor, kColumnMajor };

// A tensor of the caller: 1 to 3 dimensions, optionally with gaps between its rows or its last two
// dimensions swapped in memory. Starts poisoned: all bits set, NaN in every float dtype.
class Buffer {
 public:
  Buffer() = default;  // absent
  Buffer(int32_t dtype, std::vector<int64_t> shape, Order order = Order::kRowMajor, int64_t gap = 0)
      : dtype_(dtype), shape_(std::move(shape)), stride_(shape_.size(), 1) {
    const int last = static_cast<int>(shape_.size()) - 1;
    const bool swapped = order == Order::kColumnMajor && last >= 1;
    int64_t extent = 1;
    for (int i = last; i >= 0; --i) {
      const int at = swapped && i >= last - 1 ? 2 * last - 1 - i : i;
      stride_[at] = extent;
      extent = extent * shape_[at] + (i == last && last > 0 ? gap : 0);
    }
    bytes_.assign(static_cast<size_t>(extent * cpu::dtype_bytes(dtype)) + 8, 0xff);
  }

  bool present() const { return !bytes_.empty(); }
  void poison() { std::fill(bytes_.begin(), bytes_.end(), 0xff); }
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  int64_t shape(int i) const { return shape_[static_cast<size_t>(i)]; }

  fm_tensor tensor() {
    fm_tensor t{};
    if (!present()) return t;
    t.data = bytes_.data();
    t.dtype = dtype_;
    t.ndim = static_cast<int32_t>(shape_.size());
    std::copy(shape_.begin(), shape_.end(), t.shape);
    std::copy(stride_.begin(), stride_.end(), t.stride);
    return t;
  }

  double get(int64_t i, int64_t j = 0, int64_t k = 0) const {
    const uint8_t* from = bytes_.data() + offset(i, j, k);
    if (dtype_ == FM_I32) return read<int32_t>(from);
    if (dtype_ == FM_I64) return static_cast<double>(read<int64_t>(from));
    return cpu::with_dtype(
        dtype_, [&](auto zero) { return static_cast<double>(read<decltype(zero)>(from)); });
  }
  // Rounds to the dtype; returns what is stored.
  double set(double value, int64_t i, int64_t j = 0, int64_t k = 0) {
    uint8_t* to = bytes_.data() + offset(i, j, k);
    if (dtype_ == FM_I32) {
      write(static_cast<int32_t>(value), to);
    } else if (dtype_ == FM_I64) {
      write(static_cast<int64_t>(value), to);
    } else {
      cpu::with_dtype(dtype_, [&](auto zero) { write(static_cast<decltype(zero)>(value), to); });
    }
    return get(i, j, k);
  }

  // Calls f(i, j, k) for every element.
  template <class F>
  void each(F&& f) const {
    const int64_t n1 = shape_.size() > 1 ? shape_[1] : 1, n2 = shape_.size() > 2 ? shape_[2] : 1;
    for (int64_t i = 0; i < shape_[0]; ++i) {
      for (int64_t j = 0; j < n1; ++j) {
        for (int64_t k = 0; k < n2; ++k) f(i, j, k);
      }
    }
  }
  void fill(Rng& rng, double scale) {
    each([&](int64_t i, int64_t j, int64_t k) { set(rng.uniform(-scale, scale), i, j, k); });
  }

 private:
  template <class T>
  static T read(const uint8_t* from) {
    T value;
    std::memcpy(static_cast<void*>(&value), from, sizeof(T));
    return value;
  }
  template <class T>
  static void write(T value, uint8_t* to) {
    std::memcpy(to, &value, sizeof(T));
  }
  size_t offset(int64_t i, int64_t j, int64_t k) const {
    int64_t at = i * stride_[0];
    if (stride_.size() > 1) at += j * stride_[1];
    if (stride_.size() > 2) at += k * stride_[2];
    return static_cast<size_t>(at * cpu::dtype_bytes(dtype_));
  }

  int32_t dtype_ = FM_F32;
  std::vector<int64_t> shape_, stride_;
  std::vector<uint8_t> bytes_;
};

}  // namespace flashmoe::test
