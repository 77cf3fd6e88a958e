#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

using fabric::CallHeader;
using fabric::CallStatus;

// This rank's slots, placed: who keeps what, and which ranks each token goes to.
template <class T>
class Placement {
 public:
  explicit Placement(Launch<T>& launch)
      : launch_(launch),
        p_(launch.problem),
        capacity_(plan::expert_capacity(launch.call.layer.capacity_factor, p_)),
        ids_(launch.template route_at<int32_t>(plan::RouteScratch::kIds)),
        ranks_(launch.template route_at<int32_t>(plan::RouteScratch::kSlotRanks)),
        totals_(launch.template route_at<int32_t>(plan::RouteScratch::kTotals)) {
    auto* histograms = launch.template route_at<int32_t>(plan::RouteScratch::kHistograms);
    const int64_t tiles = plan::num_chunks(p_.tokens);
    plan::scan_histograms(histograms, tiles, p_.num_experts, totals_);
    const int64_t tile_slots = plan::kTileTokens * p_.top_k;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * tile_slots;
      plan::rank_slots(ids_ + first, std::min(tile_slots, p_.slots() - first), p_.num_experts,
                       histograms + tile * p_.num_experts, ranks_ + first);
    }
    mark_destinations();
  }

  bool kept(int64_t slot_idx) const { return plan::is_kept(ranks_[slot_idx], capacity_); }
  int64_t expert_of(int64_t slot_idx) const { return ids_[slot_idx]; }
  int64_t rank_of(int64_t slot_idx) const { return ranks_[slot_idx]; }
  int32_t kept_of_expert(int64_t expert_idx) const {
    return static_cast<int32_t>(std::min<int64_t>(totals_[expert_idx], capacity_));
  }

  // tokens_per_expert and dropped, for the caller.
  void report() const {
    const auto& ops = launch_.call.operands;
    int64_t dropped = 0;
    for (int64_t e = 0; e < p_.num_experts; ++e) {
      dropped += totals_[e] - kept_of_expert(e);
      if (present(ops.tokens_per_expert)) {
        static_cast<int64_t*>(ops.tokens_per_expert.data)[e * ops.tokens_per_expert.stride[0]] =
            totals_[e];
      }
    }
    if (present(ops.dropped)) *static_cast<int64_t*>(ops.dropped.data) = dropped;
  }

 private:
  void mark_destinations() {
    auto* masks = launch_.template route_at<uint64_t>(plan::RouteScratch::kDestinations);
    for (int64_t t = 0; t < p_.tokens; ++t) {
      uint64_t mask = 0;
      for (int64_t s = t * p_.top_k; s < (t + 1) * p_.top_k; ++s) {
        if (kept(s)) mask |= uint64_t{1} << p_.owner_of(ids_[s]);
      }
      masks[t] = mask;
    }
  }

  Launch<T>& launch_;
  const plan::Problem& p_;
  int64_t capacity_;
  const int32_t* ids_;
  int32_t* ranks_;
  int32_t* totals_;
};

template <class T>
int32_t* bank_counts(const Launch<T>& launch, int32_t rank, int32_t source) {
  auto* counts = launch.template symmetric_at<int32_t>(rank, plan::Symmetric::kCounts);
  return counts + plan::counts_index(launch.symmetric_shape, launch.epoch, source);
}

template <class T>
plan::SlotRecord* bank_slots(const Launch<T>& launch, int32_t rank, int32_t source) {
  auto* slots = launch.template symmetric_at<plan::SlotRecord>(rank, plan::Symmetric::kSlots);
  return slots + plan::slots_index(launch.symmetric_shape, launch.epoch, source);
}

// Writes this rank's counts and slot list into the banks of all peers.
template <class T>
void write_metadata(Launch<T>& launch, const Placement<T>& placement) {
  const auto& p = launch.problem;
  const auto* weights = launch.template route_at<Acc<T>>(plan::RouteScratch::kWeights);
  const int64_t local_experts = p.local_experts();
  std::vector<int64_t> begin(static_cast<size_t>(p.num_experts));
  for (int32_t peer = 0; peer < p.world; ++peer) {
    if (peer == p.rank) continue;
    int32_t* counts = bank_counts(launch, peer, p.rank);
    int64_t next = 0;
    for (int64_t e = 0; e < local_experts; ++e) {
      const int64_t expert_idx = peer * local_experts + e;
      counts[e] = placement.kept_of_expert(expert_idx);
      begin[static_cast<size_t>(expert_idx)] = next;
      next += counts[e];
    }
    launch.slots_sent += next;
    launch.metadata_bytes +=
        local_experts * 4 + next * static_cast<int64_t>(sizeof(plan::SlotRecord));
  }
  for (int64_t s = 0; s < p.slots(); ++s) {
    if (!placement.kept(s)) continue;
    const int64_t expert_idx = placement.expert_of(s);
    const int32_t owner = p.owner_of(expert_idx);
    if (owner == p.rank) continue;
    const int64_t place = begin[static_cast<size_t>(expert_idx)] + placement.rank_of(s);
    bank_slots(launch, owner, p.rank)[place] = {static_cast<int32_t>(s / p.top_k),
                                                static_cast<int32_t>(s % p.top_k), weights[s]};
  }
}

template <class T>
bool fits_memory(const Launch<T>& launch) {
  const auto& capacity = launch.group.capacity();
  const auto& s = launch.symmetric_shape;
  return launch.problem.tokens <= capacity.tokens && s.local_experts <= capacity.bank_experts &&
         capacity.tokens * s.top_k <= capacity.bank_slots &&
         plan::needed_flag_words(s.world, capacity.tokens, s.column_blocks) <=
             capacity.flag_words &&
         launch.symmetric.total <= capacity.bytes;
}

template <class T>
CallHeader make_header(const Launch<T>& launch, CallStatus status) {
  const fm_layer& layer = launch.call.layer;
  CallHeader header{};
  header.status = static_cast<uint32_t>(status);
  header.operation = static_cast<uint32_t>(launch.call.backward ? fabric::Operation::kBackward
                                                                : fabric::Operation::kForward);
  header.dtype = layer.dtype;
  header.hidden = layer.hidden;
  header.intermediate = layer.intermediate;
  header.num_experts = layer.num_experts;
  header.top_k = layer.top_k;
  header.activation = layer.activation;
  header.gated = layer.gated;
  header.weight_on_input = layer.weight_on_input;
  header.act_alpha = layer.act_alpha;
  header.act_limit = layer.act_limit;
  header.up_offset = layer.up_offset;
  header.capacity_factor = layer.capacity_factor;
  header.layer_id = layer.layer_id;
  header.tokens = launch.problem.tokens;
  return header;
}

// Every rank reads the same headers and so comes to the same capacity.
template <class T>
plan::SymmetricCapacity agreed_capacity(const Launch<T>& launch) {
  plan::SymmetricCapacity capacity = launch.group.capacity();
  plan::SymmetricShape shape = launch.symmetric_shape;
  for (int32_t rank = 0; rank < shape.world; ++rank) {
    capacity.tokens = std::max(capacity.tokens, launch.group.header_of(launch.epoch, rank).tokens);
  }
  capacity.tokens = plan::align_up(std::max<int64_t>(capacity.tokens, 1), plan::kTileTokens);
  capacity.flag_words =
      std::max(capacity.flag_words,
               plan::needed_flag_words(shape.world, capacity.tokens, shape.column_blocks));
  capacity.bank_experts = std::max(capacity.bank_experts, shape.local_experts);
  capacity.bank_slots = std::max(capacity.bank_slots, capacity.tokens * shape.top_k);
  shape.token_cap = capacity.tokens;
  shape.flag_words = capacity.flag_words;
  shape.bank_experts = capacity.bank_experts;
  shape.bank_slots = capacity.bank_slots;
  capacity.bytes = std::max(capacity.bytes, plan::symmetric_table(shape).total);
  return capacity;
}

template <class T>
void exchange_metadata(Launch<T>& launch, const Placement<T>& placement) {
  auto& group = launch.group;
  group.wait_for_credit(launch.epoch, launch.waiter);
  const bool fits = fits_memory(launch);
  group.write_header(launch.epoch,
                     make_header(launch, fits ? CallStatus::kReady : CallStatus::kNeedMemory));
  if (fits) write_metadata(launch, placement);
  group.publish_metadata(launch.epoch);
  launch.published = true;
  group.wait_for_metadata(launch.epoch, launch.waiter);
  fabric::check_headers(group, launch.epoch);
  for (int32_t rank = 0; rank < launch.problem.world; ++rank) {
    const auto status = static_cast<CallStatus>(group.header_of(launch.epoch, rank).status);
    if (status == CallStatus::kNeedMemory) throw NeedMemory{agreed_capacity(launch)};
  }
}

// counts[W][E_loc] of what every source sends here.
template <class T>
std::vector<int32_t> gather_counts(Launch<T>& launch, const Placement<T>& placement) {
  const auto& p = launch.problem;
  const int64_t local_experts = p.local_experts();
  std::vector<int32_t> counts(static_cast<size_t>(p.world * local_experts));
  for (int32_t source = 0; source < p.world; ++source) {
    int32_t* to = counts.data() + source * local_experts;
    if (source == p.rank) {
      for (int64_t e = 0; e < local_experts; ++e) {
        to[e] = placement.kept_of_expert(p.rank * local_experts + e);
      }
    } else {
      std::copy_n(bank_counts(launch, p.rank, source), local_experts, to);
    }
  }
  return counts;
}

template <class T>
void size_sources(Launch<T>& launch) {
  const auto& p = launch.problem;
  launch.source_tokens.assign(static_cast<size_t>(p.world), p.tokens);
  launch.source_chunk_begin.assign(static_cast<size_t>(p.world) + 1, 0);
  launch.source_slot_begin.assign(static_cast<size_t>(p.world) + 1, 0);
  for (int32_t source = 0; source < p.world; ++source) {
    const auto s = static_cast<size_t>(source);
    if (p.world > 1) {
      launch.source_tokens[s] = launch.group.header_of(launch.epoch, source).tokens;
    }
    const int64_t tokens = launch.source_tokens[s];
    launch.source_chunk_begin[s + 1] = launch.source_chunk_begin[s] + plan::num_chunks(tokens);
    launch.source_slot_begin[s + 1] = launch.source_slot_begin[s] + tokens * p.top_k;
  }
}

// Lays out the row scratch for the counts and places the experts in it.
template <class T>
void place_experts(Launch<T>& launch, const std::vector<int32_t>& counts) {
  const auto& p = launch.problem;
  const auto& block = launch.tiles.block;
  std::vector<int64_t> begin(static_cast<size_t>(p.local_experts() + 1));
  std::vector<int64_t> sizes(begin.size()), segments(begin.size() * p.world);
  launch.num_rows = plan::place_rows(p, counts.data(), block.row_align, begin.data(), sizes.data(),
                                     segments.data());
  if (launch.num_rows > std::numeric_limits<int32_t>::max()) {
    fail(FM_INVALID_VALUE, "rank ", p.rank, " would compute ", launch.num_rows,
         " rows; at most 2^31 - 1 are indexed: use fewer tokens or more ranks");
  }
  const plan::RowShape shape{
      .rows = launch.num_rows,
      .blocks = plan::max_blocks(launch.num_rows, p.local_experts(), block),
      .all_slots = launch.source_slot_begin.back(),
      .column_width = launch.tiles.column_width,
      .column_blocks = launch.column_blocks,
      .weight_parts = launch.weight_parts,
      .element_bytes = sizeof(T),
      .acc_bytes = sizeof(Acc<T>),
      .backward = launch.call.backward,
  };
  launch.rows = plan::row_table(p, shape);
  launch.rows_base = launch.workspace.rows.reserve(launch.rows.total);
  plan::place_rows(p, counts.data(), block.row_align,
                   launch.template rows_at<int64_t>(plan::RowScratch::kExpertBegin),
                   launch.template rows_at<int64_t>(plan::RowScratch::kExpertRows),
                   launch.template rows_at<int64_t>(plan::RowScratch::kSegmentBegin));
}

// Fills the per-row and per-slot arrays, source by source.
template <class T>
class RowWriter {
 public:
  explicit RowWriter(Launch<T>& launch)
      : launch_(launch),
        p_(launch.problem),
        token_(launch.template rows_at<int32_t>(plan::RowScratch::kRowToken)),
        source_(launch.template rows_at<int32_t>(plan::RowScratch::kRowSource)),
        weight_(launch.template rows_at<Acc<T>>(plan::RowScratch::kRowWeight)),
        slot_row_(launch.template rows_at<int32_t>(plan::RowScratch::kSlotRow)),
        segments_(launch.template rows_at<int64_t>(plan::RowScratch::kSegmentBegin)) {
    std::fill_n(token_, launch.num_rows, -1);
    std::fill_n(slot_row_, launch.source_slot_begin.back(), -1);
  }

  void write_own(const Placement<T>& placement) {
    const auto* weights = launch_.template route_at<Acc<T>>(plan::RouteScratch::kWeights);
    for (int64_t s = 0; s < p_.slots(); ++s) {
      if (!placement.kept(s) || p_.owner_of(placement.expert_of(s)) != p_.rank) continue;
      const int64_t expert = p_.local_expert_of(placement.expert_of(s));
      write(expert, p_.rank, placement.rank_of(s), s, weights[s]);
    }
  }

  void write_received(int32_t source, const int32_t* counts) {
    const plan::SlotRecord* record = bank_slots(launch_, p_.rank, source);
    for (int64_t e = 0; e < p_.local_experts(); ++e) {
      for (int32_t i = 0; i < counts[e]; ++i, ++record) {
        write(e, source, i, record->token_idx * p_.top_k + record->slot_j,
              static_cast<Acc<T>>(record->weight));
      }
    }
  }

 private:
  void write(int64_t local_expert_idx, int32_t source, int64_t place, int64_t slot_idx,
             Acc<T> weight) {
    const int32_t step = p_.step_of_source(source);
    const int64_t row = segments_[local_expert_idx * p_.world + step] + place;
    token_[row] = static_cast<int32_t>(slot_idx / p_.top_k);
    source_[row] = source;
    weight_[row] = weight;
    slot_row_[launch_.source_slot_begin[static_cast<size_t>(source)] + slot_idx] =
        static_cast<int32_t>(row);
  }

  Launch<T>& launch_;
  const plan::Problem& p_;
  int32_t *token_, *source_;
  Acc<T>* weight_;
  int32_t* slot_row_;
  const int64_t* segments_;
};

template <class T>
void lay_out_blocks(Launch<T>& launch) {
  const auto& p = launch.problem;
  auto* blocks = launch.template rows_at<plan::Block>(plan::RowScratch::kBlocks);
  launch.num_blocks = plan::make_blocks(
      p, launch.tiles.block, launch.template rows_at<int64_t>(plan::RowScratch::kExpertBegin),
      launch.template rows_at<int64_t>(plan::RowScratch::kExpertRows),
      launch.template rows_at<int64_t>(plan::RowScratch::kSegmentBegin), blocks);
  plan::sort_blocks_by_step(blocks, launch.num_blocks, p.world,
                            launch.template rows_at<int32_t>(plan::RowScratch::kUpOrder));
  for (int64_t b = 0; b < launch.num_blocks; ++b) {
    new (launch.up_done() + b) std::atomic<uint32_t>(0);
  }
}

template <class T>
void count_tasks(Launch<T>& launch) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const int64_t chunks = plan::num_chunks(p.tokens);
  auto& space = launch.space;
  space.push_chunks = p.world > 1 ? chunks : 0;
  space.blocks = launch.num_blocks;
  space.up_tiles = launch.up_tiles;
  space.column_blocks = launch.column_blocks;
  space.return_chunks = launch.source_chunk_begin.back();
  const bool needs_combine =
      p.world > 1 ||
      (launch.call.backward && (launch.call.fused_router() || present(ops.grad_topk_weights)));
  space.combine_chunks = needs_combine ? chunks : 0;
  if (!launch.call.backward) return;
  space.weight_tiles = p.local_experts() * weight_tiles_per_expert(launch);
  if (launch.call.fused_router() && (present(ops.grad_w_router) || present(ops.grad_router_bias))) {
    space.router_tiles = plan::ceil_div(p.num_experts, launch.tiles.router_experts);
  }
}

template <class T>
void count_traffic(Launch<T>& launch, const std::vector<int32_t>& counts) {
  const auto& p = launch.problem;
  const auto* masks = launch.template route_at<uint64_t>(plan::RouteScratch::kDestinations);
  const uint64_t peers = ~(uint64_t{1} << p.rank);
  for (int64_t t = 0; t < p.tokens; ++t) launch.rows_sent += std::popcount(masks[t] & peers);
  for (int32_t source = 0; source < p.world; ++source) {
    const int32_t* from = counts.data() + source * p.local_experts();
    const int64_t slots = std::accumulate(from, from + p.local_experts(), int64_t{0});
    launch.routed_rows += slots;
    if (source != p.rank) launch.slots_received += slots;
  }
}

// The rows of z that no tile writes hold zeros.
template <class T>
void clear_unused_z(const Launch<T>& launch) {
  const fm_tensor& z = launch.call.operands.z;
  if (!present(z)) return;
  if (z.shape[0] < launch.num_rows) {
    fail(FM_INVALID_VALUE, "z has ", z.shape[0], " rows, this launch needs ", launch.num_rows,
         "; fm_z_rows() gives the bound");
  }
  if (launch.call.backward) return;
  for (int64_t row = launch.num_rows; row < z.shape[0]; ++row) {
    std::fill_n(row_of<T>(z, row), launch.problem.up_rows(), T(0));
  }
}

}  // namespace

template <class T>
void make_plan(Launch<T>& launch) {
  const auto& p = launch.problem;
  launch.waiter.until_equal(launch.routed, static_cast<uint32_t>(launch.space.route_tiles),
                            {"route tiles", "plan", -1, launch.epoch});
  const Placement<T> placement(launch);
  placement.report();
  if (p.world > 1) exchange_metadata(launch, placement);
  size_sources(launch);
  const std::vector<int32_t> counts = gather_counts(launch, placement);
  place_experts(launch, counts);
  clear_unused_z(launch);
  count_traffic(launch, counts);
  RowWriter<T> writer(launch);
  writer.write_own(placement);
  for (int32_t source = 0; source < p.world; ++source) {
    if (source == p.rank) continue;
    writer.write_received(source, counts.data() + source * p.local_experts());
  }
  lay_out_blocks(launch);
  count_tasks(launch);
  launch.planned.store(1, std::memory_order_release);
}

#define FM_INSTANTIATE(T) template void make_plan<T>(Launch<T>&);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
