// Of the forward of few tokens (decode.cuh): its shared memory, its units, and the warp that loads.
#pragma once

#include "cuda/kernel/decode.h"
#include "cuda/kernel/roles.cuh"
#include "cuda/stage/decode_plan.cuh"
#include "cuda/sync/ring.cuh"

namespace flashmoe::cuda::kernel {

using config::Decode;

struct DecodeShared {
  // Before the roles begin, the arena of routing.
  alignas(1024) uint8_t stages[Decode::kStages][Decode::kStageBytes];
  // Of the warps' parts of a unit's sums; two, so that the warps meet once a unit.
  float parts[2][Decode::kMathWarps][Decode::kBoxes * Decode::kUpRows][Decode::kTokens];
  sync::RingBarriers<Decode::kStages> barriers;
  sync::RingBarriers<Decode::kTicketSlots> ticket_barriers;
  int32_t tickets[Decode::kTicketSlots];  // of units, from the load warp to the others
  stage::DecodePlan plan;
  bool has_scratch;
};

// How many units there are of either product, and stages of one. Ticket -> unit: those of the up
// product, then those of the down product.
struct DecodeWalk {
  int32_t units_of_expert;  // of the up product
  int32_t up_units;
  int32_t up_stages;
  int32_t down_units;
  int32_t boxes_of_expert;  // of a down unit's rows
  int32_t down_boxes;       // of all chosen experts
  int32_t down_stages;
  int32_t out_columns;  // of an up unit

  FM_DEVICE DecodeWalk(const DecodeParams& params, int32_t num_chosen) {
    const auto& sizes = params.forward.sizes;
    const auto stages_of = [](int32_t depth, int32_t chunks) {
      return plan::ceil_div(depth, chunks * config::kDepthStep);
    };
    out_columns = params.is_gated ? Decode::kUpRows : Decode::kBoxes * Decode::kUpRows;
    units_of_expert = sizes.intermediate / out_columns;
    up_units = num_chosen * units_of_expert;
    up_stages = stages_of(sizes.hidden, Decode::kUpChunks);
    down_units = sizes.hidden / Decode::kDownRows;
    boxes_of_expert = stages_of(sizes.intermediate, Decode::kDownChunks);
    down_boxes = num_chosen * boxes_of_expert;
    down_stages = plan::ceil_div(down_boxes, Decode::kBoxes);
  }
  FM_DEVICE int32_t num_tickets() const { return up_units + down_units; }
};

// The load warp's thread: stages in the order in which the units need them.
class DecodeLoad {
 public:
  FM_DEVICE DecodeLoad(const DecodeParams& params, DecodeShared& smem, sync::Waiter& waiter)
      : params_(params.forward), smem_(smem), waiter_(waiter), stages_(smem.barriers) {}

  // Gate rows and up rows [row, ...) of an expert.
  FM_DEVICE void load_up(int32_t expert_idx, int32_t row, int32_t num_stages) {
    for (int32_t stage = 0; stage < num_stages; ++stage) {
      const int32_t at[4] = {0, row, stage * Decode::kUpChunks, expert_idx};
      if (!begin(Decode::kBoxes)) return;
      copy(0, params_.up_weights[0], at);
      copy(1, params_.up_weights[1], at);
      stages_.advance();
    }
  }
  // Rows [row, ...) of all chosen experts; the last stage may have one box.
  FM_DEVICE void load_down(int32_t row, const DecodeWalk& walk) {
    DownBox box(smem_.plan, row);
    for (int32_t left = walk.down_boxes; left > 0; left -= Decode::kBoxes) {
      const bool has_second = left > 1;
      if (!begin(has_second ? 2 : 1)) return;
      copy(0, params_.down_weights, box.at);
      box.advance(smem_.plan, walk);
      if (has_second) {
        copy(1, params_.down_weights, box.at);
        box.advance(smem_.plan, walk);
      }
      stages_.advance();
    }
  }
  // Tells the other warps of the CTA.
  FM_DEVICE void send(int32_t ticket) {
    waiter_.wait(&smem_.ticket_barriers.empty[tickets_.slot()], tickets_.parity() ^ 1,
                 sync::WaitTag::kTileEmpty);
    smem_.tickets[tickets_.slot()] = ticket;
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                         &smem_.ticket_barriers.full[tickets_.slot()]);
    tickets_.advance();
  }

 private:
  // Coordinates of a box of the down product: one chosen expert after the other.
  struct DownBox {
    int32_t at[4];
    int32_t chosen_idx = 0;

    FM_DEVICE DownBox(const stage::DecodePlan& plan, int32_t row)
        : at{0, row, 0, plan.experts[0]} {}
    FM_DEVICE void advance(const stage::DecodePlan& plan, const DecodeWalk& walk) {
      at[2] += Decode::kDownChunks;
      if (at[2] < walk.boxes_of_expert * Decode::kDownChunks) return;
      at[2] = 0;
      at[3] = plan.experts[min(++chosen_idx, plan.num_chosen - 1)];
    }
  };

  // False once a wait has run out of time: stages might still be read.
  FM_DEVICE bool begin(int32_t num_boxes) {
    stages_.acquire(waiter_);
    if (!waiter_.alive()) return false;
    stages_.announce(num_boxes * Decode::kBoxBytes);
    return true;
  }
  FM_DEVICE void copy(int32_t box, const CUtensorMap& map, const int32_t (&at)[4]) {
    uint8_t* to = smem_.stages[stages_.slot()] + box * Decode::kBoxBytes;
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, stages_.full());
  }

  const ForwardParams& params_;
  DecodeShared& smem_;
  sync::Waiter& waiter_;
  sync::StageWriter<Decode::kStages> stages_;
  sync::RingCursor<Decode::kTicketSlots> tickets_;
};

FM_DEVICE void decode_load(const DecodeParams& params, DecodeShared& smem, const DecodeWalk& walk) {
  if (!ptx::elect_one()) return;
  sync::Waiter waiter(params.forward.waits);
  DecodeLoad load(params, smem, waiter);
  const int32_t num_ctas = ptx::num_blocks();
  TicketCounter& counter = *params.forward.memory.tickets;
  int32_t ticket = ptx::block_idx();
  while (ticket < walk.num_tickets() && waiter.alive()) {
    // It is there when the unit's loads have begun.
    const int32_t next = num_ctas + static_cast<int32_t>(atomicAdd(&counter.next, 1u));
    load.send(ticket);
    if (ticket < walk.up_units) {
      load.load_up(smem.plan.experts[ticket / walk.units_of_expert],
                   ticket % walk.units_of_expert * walk.out_columns, walk.up_stages);
    } else {
      load.load_down((ticket - walk.up_units) * Decode::kDownRows, walk);
    }
    ticket = next;
  }
  load.send(walk.num_tickets());
  finish_tickets(counter, num_ctas);
}

}  // namespace flashmoe::cuda::kernel
