// Ticket -> task: one walk for every role and both engines.
//
// Tickets are taken from one counter in this order:
//
//   route tiles | plan | push chunks | up tiles | down 0 | down 1, return 0 | down 2, return 1 |
//   ...
//   ... | return C-1 | weight-gradient tiles | combine chunks | router-gradient tiles
//
// A task waits only for tasks with smaller tickets of its own rank and for flags that peers raise
// in push, return and plan tasks, none of which waits for anything of this launch but plans, pushes
// and math of smaller tickets. So the walk never deadlocks, with one thread or a thousand. The down
// product's ring holds two column blocks: `down c` reuses the slot of `return c-2`, which the order
// puts before it.
//
// A GPU splits the same sequence over math and communication roles; the CPU's threads take all of
// it.
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::plan {

enum class TaskKind : int32_t {
  kRoute,
  kPlan,
  kPush,
  kUp,
  kDown,
  kReturn,
  kWeight,
  kCombine,
  kRouter,
  kEnd,
};

inline constexpr int64_t kRingSlots = 2;

struct Task {
  TaskKind kind = TaskKind::kEnd;
  int64_t major = 0;  // up: position in up_order; down, return: column block; else the index
  int64_t minor = 0;  // up: n-tile; down: natural block index; return: chunk over all sources
};

// How many tasks of each kind a launch has. The first two are known before the plan, the rest
// after.
struct TaskSpace {
  int64_t route_tiles = 0;
  int64_t push_chunks = 0;
  int64_t blocks = 0;
  int64_t up_tiles = 0;       // n-tiles of one block
  int64_t column_blocks = 0;  // of the down product (backward: of the input gradient)
  int64_t return_chunks = 0;  // of one column block, over all sources
  int64_t weight_tiles = 0;
  int64_t combine_chunks = 0;
  int64_t router_tiles = 0;

  FM_HD constexpr int64_t plan_ticket() const { return route_tiles; }
  FM_HD constexpr int64_t down_tickets() const { return column_blocks * (blocks + return_chunks); }
  FM_HD constexpr int64_t total() const {
    return route_tiles + 1 + push_chunks + blocks * up_tiles + down_tickets() + weight_tiles +
           combine_chunks + router_tiles;
  }
};

// Serpentine over the experts: what a column block used last is used first by the next.
FM_HD constexpr int64_t down_block(int64_t column_block, int64_t position, int64_t num_blocks) {
  return column_block % 2 == 0 ? position : num_blocks - 1 - position;
}

// ticket in [0, down_tickets()): down 0 | down 1, return 0 | ... | return C-1.
FM_HD constexpr Task down_or_return_task(const TaskSpace& space, int64_t ticket) {
  if (ticket < space.blocks) {
    return {TaskKind::kDown, 0, down_block(0, ticket, space.blocks)};
  }
  const int64_t group = space.blocks + space.return_chunks;
  const int64_t column_block = 1 + (ticket - space.blocks) / group;
  const int64_t position = (ticket - space.blocks) % group;
  if (column_block == space.column_blocks) {
    return {TaskKind::kReturn, column_block - 1, position};
  }
  if (position < space.blocks) {
    return {TaskKind::kDown, column_block, down_block(column_block, position, space.blocks)};
  }
  return {TaskKind::kReturn, column_block - 1, position - space.blocks};
}

FM_HD constexpr Task task_at(const TaskSpace& space, int64_t ticket) {
  if (ticket < space.route_tiles) return {TaskKind::kRoute, ticket, 0};
  ticket -= space.route_tiles;
  if (ticket == 0) return {TaskKind::kPlan, 0, 0};
  ticket -= 1;
  if (ticket < space.push_chunks) return {TaskKind::kPush, ticket, 0};
  ticket -= space.push_chunks;
  if (ticket < space.blocks * space.up_tiles) {
    return {TaskKind::kUp, ticket / space.up_tiles, ticket % space.up_tiles};
  }
  ticket -= space.blocks * space.up_tiles;
  if (ticket < space.down_tickets()) return down_or_return_task(space, ticket);
  ticket -= space.down_tickets();
  if (ticket < space.weight_tiles) return {TaskKind::kWeight, ticket, 0};
  ticket -= space.weight_tiles;
  if (ticket < space.combine_chunks) return {TaskKind::kCombine, ticket, 0};
  ticket -= space.combine_chunks;
  if (ticket < space.router_tiles) return {TaskKind::kRouter, ticket, 0};
  return {};
}

}  // namespace flashmoe::plan
