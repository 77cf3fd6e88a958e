#include "cuda/launch/ranks.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "cuda/config/forward.h"
#include "cuda/launch/check.h"

namespace flashmoe::cuda::launch {
namespace {

int64_t bits_of(double value) { return std::bit_cast<int64_t>(value); }

config::RankHeader header_of(const fm_layer& layer, int64_t tokens, const RankArguments& ranks,
                             config::Direction direction) {
  using config::RankField;
  config::RankHeader header{};
  const auto set = [&](RankField field, int64_t value) {
    header.fields[static_cast<int>(field)] = value;
  };
  header.tokens = tokens;
  set(RankField::kDtype, layer.dtype);
  set(RankField::kHidden, layer.hidden);
  set(RankField::kIntermediate, layer.intermediate);
  set(RankField::kNumExperts, layer.num_experts);
  set(RankField::kTopK, layer.top_k);
  set(RankField::kActivation, layer.activation);
  set(RankField::kGated, layer.gated);
  set(RankField::kWeightOnInput, layer.weight_on_input);
  set(RankField::kActAlpha, bits_of(layer.act_alpha));
  set(RankField::kActLimit, bits_of(layer.act_limit));
  set(RankField::kUpOffset, bits_of(layer.up_offset));
  set(RankField::kCapacityFactor, bits_of(layer.capacity_factor));
  set(RankField::kLayerId, layer.layer_id);
  set(RankField::kTokenCapacity, ranks.capacity.tokens);
  set(RankField::kDirection, static_cast<int64_t>(direction));
  return header;
}

// What the words that ranks exchange do not hold, or their memory has no room for.
std::string refuse_exchange(const fm_layer& layer, int64_t tokens, const RankArguments& ranks) {
  const config::SymmetricCapacity& has = ranks.capacity;
  const config::RankSizes sizes = rank_sizes_of(layer, ranks);
  if (std::string reason = config::refuse_rank_sizes(sizes); !reason.empty()) return reason;
  if (tokens > has.tokens) {
    return text_of("x has ", tokens, " tokens; the group's memory is made for ", has.tokens);
  }
  const config::SymmetricCapacity needs = config::needed_capacity(sizes);
  if (needs.slots > has.slots || needs.local_experts > has.local_experts ||
      needs.flag_words > has.flag_words || needs.row_bytes > has.row_bytes) {
    return text_of("the group's memory is made for ", has.slots, " slots, ", has.local_experts,
                   " experts a rank and ", has.row_bytes, " bytes of rows; this layer needs ",
                   needs.slots, ", ", needs.local_experts, " and ", needs.row_bytes);
  }
  return {};
}

}  // namespace

int64_t token_cap_of(int64_t tokens, const RankArguments& ranks) {
  return ranks.world == 1 ? tokens : ranks.capacity.tokens;
}

int64_t rows_of(const fm_layer& layer, int64_t tokens, const RankArguments& ranks) {
  const int64_t slots = token_cap_of(tokens, ranks) * layer.top_k;
  return config::forward_rows(slots * std::min(ranks.world, 2), layer.num_experts);
}

int32_t source_groups_of(const fm_layer& layer, int64_t tokens, const RankArguments& ranks) {
  constexpr int64_t kRowsOfBlock = 128;
  return tokens * layer.top_k / layer.num_experts >= kRowsOfBlock ? ranks.world : 1;
}

int64_t rank_slots_of(const fm_layer& layer, const RankArguments& ranks) {
  return ranks.world == 1 ? 0 : ranks.world * ranks.capacity.tokens * layer.top_k;
}

config::RankSizes rank_sizes_of(const fm_layer& layer, const RankArguments& ranks) {
  return {.world = ranks.world,
          .tokens = ranks.capacity.tokens,
          .hidden = layer.hidden,
          .top_k = layer.top_k,
          .local_experts = layer.num_experts / ranks.world};
}

std::string refuse_tokens(const fm_layer& layer, int64_t tokens, const RankArguments& ranks) {
  // In 32 bits, in steps of all threads of a grid.
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - (1 << 20);
  if (rows_of(layer, tokens, ranks) > kMaxRows) {
    return text_of("tokens * top_k is ", token_cap_of(tokens, ranks) * layer.top_k,
                   "; accepted on CUDA: to ", kMaxRows / std::min(ranks.world, 2));
  }
  return ranks.world == 1 ? std::string{} : refuse_exchange(layer, tokens, ranks);
}

kernel::RankParams rank_params(const fm_layer& layer, int64_t tokens, const RankArguments& ranks,
                               int64_t rows, config::Direction direction) {
  using config::RowKind;
  using config::Symmetric;
  kernel::RankParams params{};
  params.rank = ranks.rank;
  params.world = ranks.world;
  if (ranks.world == 1) return params;
  const config::SymmetricTable table = config::symmetric_table(ranks.world, ranks.capacity);
  params.token_cap = static_cast<int32_t>(ranks.capacity.tokens);
  params.bank_experts = static_cast<int32_t>(ranks.capacity.local_experts);
  params.bank_slots = static_cast<int32_t>(ranks.capacity.slots);
  params.row_cap = static_cast<int32_t>(rows);
  params.counts_offset = table[Symmetric::kCounts].offset;
  params.slots_offset = table[Symmetric::kSlots].offset;
  params.flags_offset = table[Symmetric::kFlags].offset;
  const auto set_received = [&](RowKind kind, Symmetric region) {
    params.received_offsets[static_cast<int>(kind)] = table[region].offset;
  };
  set_received(RowKind::kToken, Symmetric::kReceived);
  set_received(RowKind::kGrad, Symmetric::kReceivedGrad);
  params.partial_offset = table[Symmetric::kPartial].offset;
  params.slot_grads_offset = table[Symmetric::kSlotGrads].offset;
  for (int32_t rank = 0; rank < ranks.world; ++rank) {
    params.regions[rank] = static_cast<uint8_t*>(ranks.regions[rank]);
  }
  params.header = header_of(layer, tokens, ranks, direction);
  return params;
}

sync::WaitBounds waits_of(const RankArguments& ranks, sync::LaunchReports& reports,
                          uint64_t timeout_ns) {
  const uint32_t bound = sync::microseconds(timeout_ns);
  sync::WaitBounds waits{.report = &reports.failure,
                         .timeout_us = bound,
                         .local_timeout_us = bound,
                         .abort = nullptr,
                         .own_mark = 0};
  if (ranks.world == 1) return waits;
  waits.local_timeout_us = sync::local_bound(bound);
  waits.abort = &static_cast<config::RankControl*>(ranks.regions[ranks.rank])->abort;
  waits.own_mark = static_cast<uint32_t>(ranks.rank) + 1;
  return waits;
}

}  // namespace flashmoe::cuda::launch
