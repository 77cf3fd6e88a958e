// How the grouped product is cut for a GPU: one value a kernel, on host and device.
//
//   out[row, column] = act(sum_k tokens[row, k] * weights[expert of row, column, k])
//
// Weights are on M (128 a CTA), tokens on N (multiples of 16): padding an expert's rows to 16 costs
// 1.5 % of the products where blocks of 128 rows would cost 13.7 % (qwen3-30b, 8192 tokens).
#pragma once

#include <concepts>
#include <cstdint>
#include <string>

#include "cuda/tile/schedule.h"

namespace flashmoe::cuda::config {

enum class Element : int32_t { kBf16, kFp16 };

// Which index of a weight matrix is contiguous.
enum class Major : int32_t {
  kDepth,    // [expert, column, k], as checkpoints hold nn.Linear
  kColumns,  // [expert, k, column], "transposed" layouts; the input-gradient products read it so
};

enum class Epilogue : int32_t {
  kStore,     // out = sum
  kActivate,  // out = act(sum)
  kGated,     // out = act(gate) * up; gate rows are a tile's first half, up rows its second
  // The same where gate and up alternate in memory that is contiguous along them (transposed
  // weights): a tile has 64 pairs as they lie, and lanes exchange sums.
  kGatedPairs,
};

inline constexpr int32_t kElementBytes = 2;
inline constexpr int32_t kClusterSize = 2;
inline constexpr int32_t kWeightRows = 128;  // M of a CTA's tile: two products of 64
inline constexpr int32_t kHalfRows = 64;
inline constexpr int32_t kDepthStep = 64;    // k of a stage: 128 bytes, one row of the swizzle
inline constexpr int32_t kTicketLead = 1;    // tiles that a pair knows beside the one it loads
inline constexpr int32_t kTileSlots = 4;     // messages under way between the ticket warp and roles
inline constexpr int32_t kStoreTokens = 32;  // an epilogue chunk: 32 tokens by 64 columns
inline constexpr int32_t kStoreBytes = kStoreTokens * kHalfRows * kElementBytes;
inline constexpr int32_t kStoreBuffers = 3;  // a math warpgroup; four stages and more of these lost
inline constexpr int32_t kWarpgroup = 128;   // threads
inline constexpr int32_t kThreads = 3 * kWarpgroup;  // load, math, math
inline constexpr int32_t kRegisterFile = 65536;
inline constexpr int32_t kSharedLimit = 227 * 1024;  // bytes of a CTA
// Tokens of the widest tile. A product by itself would have registers for 192, 1 % more speed; the
// forward's other roles need them (docs/perf-notes.md).
inline constexpr int32_t kMaxTokens = 176;
inline constexpr int32_t kTokenMaps = kMaxTokens / tile::kTokenStep;  // one a tile width

// Registers as the product by itself has them; the forward divides them otherwise.
struct GroupedProduct {
  Element element = Element::kBf16;
  Major major = Major::kDepth;
  Epilogue epilogue = Epilogue::kStore;
  int32_t max_tokens = kMaxTokens;
  int32_t num_stages = 5;
  int32_t load_registers = 56;
  int32_t math_registers = 224;

  FM_HD constexpr bool gated() const {
    return epilogue == Epilogue::kGated || epilogue == Epilogue::kGatedPairs;
  }
  // Whether a tile's second half holds the up rows of its first.
  FM_HD constexpr bool halves_are_gates() const { return epilogue == Epilogue::kGated; }
  // Columns of `out` that a CTA's tile makes.
  FM_HD constexpr int32_t out_columns() const { return gated() ? kHalfRows : kWeightRows; }
  // Weight rows from one tile's to the next; of gate rows alone where they are a half of their own.
  FM_HD constexpr int32_t weight_step() const {
    return halves_are_gates() ? kHalfRows : kWeightRows;
  }
  FM_HD constexpr int32_t max_steps() const { return max_tokens / tile::kTokenStep; }
  FM_HD constexpr int32_t weight_bytes() const { return kWeightRows * kDepthStep * kElementBytes; }
  FM_HD constexpr int32_t token_bytes(int32_t num_steps) const {
    return num_steps * tile::kTokenStep * kDepthStep * kElementBytes;
  }
  FM_HD constexpr int32_t stage_bytes() const { return weight_bytes() + token_bytes(max_steps()); }
  FM_HD constexpr int32_t staging_bytes() const { return 2 * kStoreBuffers * kStoreBytes; }
};

// What ptxas and the hardware need; the kernel template asks for it.
constexpr bool is_valid(const GroupedProduct& config) {
  const int32_t registers = kWarpgroup * (config.load_registers + 2 * config.math_registers);
  return config.max_tokens % tile::kTokenStep == 0 && config.max_tokens <= kMaxTokens &&
         config.num_stages >= 2 && config.load_registers % 8 == 0 &&
         config.math_registers % 8 == 0 && registers <= kRegisterFile;
}

// A kernel is a template over a type that holds its configuration: nvcc 13.0 with g++ 12 makes
// broken stubs for a struct value as a template argument.
template <class C>
concept GroupedProductConfig = requires {
  { C::value } -> std::convertible_to<const GroupedProduct&>;
}
&&is_valid(C::value);

template <Element kElement, Major kMajor, Epilogue kEpilogue>
struct GroupedProductOf {
  static constexpr GroupedProduct value{
      .element = kElement, .major = kMajor, .epilogue = kEpilogue};
};

constexpr const char* name_of(Element element) {
  return element == Element::kBf16 ? "bf16" : "fp16";
}
constexpr const char* name_of(Major major) { return major == Major::kDepth ? "depth" : "columns"; }
constexpr const char* name_of(Epilogue epilogue) {
  if (epilogue == Epilogue::kStore) return "store";
  if (epilogue == Epilogue::kActivate) return "activate";
  return epilogue == Epilogue::kGated ? "gated" : "gated pairs";
}

// "bf16 depth store: 128 x 176 ping-pong, pairs, 5 stages of 38912 bytes, registers 56 + 2 x 224"
inline std::string describe(const GroupedProduct& config) {
  return std::string(name_of(config.element)) + " " + name_of(config.major) + " " +
         name_of(config.epilogue) + ": " + std::to_string(kWeightRows) + " x " +
         std::to_string(config.max_tokens) + " ping-pong, pairs, " +
         std::to_string(config.num_stages) + " stages of " + std::to_string(config.stage_bytes()) +
         " bytes, registers " + std::to_string(config.load_registers) + " + 2 x " +
         std::to_string(config.math_registers);
}

}  // namespace flashmoe::cuda::config
