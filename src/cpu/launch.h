// The state of one launch on one rank, shared by its threads, and the walk over its tasks.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "cpu/call.h"
#include "cpu/gemm.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"
#include "cpu/workspace.h"
#include "fabric/group.h"
#include "plan/layout.h"
#include "plan/rows.h"
#include "plan/tasks.h"

namespace flashmoe::cpu {

// A launch ends like this when the group's memory is too small for some rank's call.
struct NeedMemory {
  plan::SymmetricCapacity capacity;
};

template <class T>
struct Launch {
  using A = Acc<T>;

  Launch(const Call& call_in, fabric::Group& group_in, Workspace& workspace_in, int threads,
         fabric::Waiter& waiter_in);

  const Call& call;
  fabric::Group& group;
  Workspace& workspace;
  fabric::Waiter& waiter;
  const plan::Problem& problem;
  const TileConfig tiles;
  const int num_threads;
  plan::Epoch epoch = 0;

  // --- sizes derived from the problem
  int64_t column_blocks = 0;
  int64_t up_tiles = 0;
  int64_t weight_parts = 0;
  plan::SymmetricShape symmetric_shape;
  plan::SymmetricTable symmetric;
  plan::RouteTable route;
  plan::RowTable rows;
  int64_t num_rows = 0;  // padding included
  int64_t num_blocks = 0;

  // --- written by the plan task, read after it
  plan::TaskSpace space;
  std::vector<int64_t> source_tokens;       // T_s of every rank
  std::vector<int64_t> source_chunk_begin;  // prefix sums of the sources' chunks [W + 1]
  std::vector<int64_t> source_slot_begin;   // prefix sums of T_s * k [W + 1]

  // --- progress of this rank's threads (local flags; counters start at zero in every launch)
  std::atomic<uint32_t> routed{0};                 // route tiles done
  std::atomic<uint32_t> planned{0};                // 1: the plan stands
  std::atomic<uint32_t> up_total{0};               // up tiles done, all blocks
  std::vector<std::atomic<uint32_t>> down_done;    // down tiles done, by column block
  std::vector<std::atomic<uint32_t>> return_done;  // return chunks done, by column block
  std::atomic<uint32_t> combined{0};               // combine chunks done
  std::atomic<int64_t> next_ticket{0};

  // --- what the launch reports (fm_stats)
  bool published = false;                     // the peers have this rank's metadata
  int64_t routed_rows = 0;                    // rows without padding
  int64_t rows_sent = 0, slots_sent = 0;      // token rows to peers; slots to peers
  int64_t slots_received = 0;                 // of peers
  int64_t metadata_bytes = 0;                 // to peers
  std::atomic<int64_t> returned_elements{0};  // of partial sums, to peers

  // --- addresses
  template <class Type>
  Type* route_at(plan::RouteScratch region) const {
    return reinterpret_cast<Type*>(route_base + route[region].offset);
  }
  template <class Type>
  Type* rows_at(plan::RowScratch region) const {
    return reinterpret_cast<Type*>(rows_base + rows[region].offset);
  }
  // A region of `rank`'s symmetric memory.
  template <class Type>
  Type* symmetric_at(int32_t rank, plan::Symmetric region) const {
    return reinterpret_cast<Type*>(group.fabric().data(rank) + symmetric[region].offset);
  }
  A* panel_of(int thread_idx) const {
    const int64_t stride = route[plan::RouteScratch::kPanels].bytes / num_threads;
    return reinterpret_cast<A*>(route_base + route[plan::RouteScratch::kPanels].offset +
                                thread_idx * stride);
  }
  std::byte* route_base = nullptr;
  std::byte* rows_base = nullptr;

  std::atomic<uint32_t>* up_done() const {
    return rows_at<std::atomic<uint32_t>>(plan::RowScratch::kUpDone);
  }

  // Fills RouteScratch::kRouterWeight where the launch has it.
  void widen_router_weight() const;

  // Hidden columns of a column block.
  int64_t column_begin(int64_t column_block) const { return column_block * tiles.column_width; }
  int64_t column_count(int64_t column_block) const {
    return plan::min_of(tiles.column_width, problem.hidden - column_begin(column_block));
  }
  // The ring's storage of a column block: row-major [rows][column_width].
  T* ring_at(int64_t column_block) const {
    return rows_at<T>(plan::RowScratch::kRing) +
           (column_block % plan::kRingSlots) * num_rows * tiles.column_width;
  }
  // Token row of `source`: x or grad_y, in place for own tokens, as received for others.
  const T* token_row(const fm_tensor& own, plan::Symmetric received, int32_t source,
                     int64_t token_idx) const {
    if (source == problem.rank) return row_of<const T>(own, token_idx);
    const T* base = symmetric_at<const T>(problem.rank, received);
    return base + (source * symmetric_shape.token_cap + token_idx) * problem.hidden;
  }
};

// Element size of the launch's widened copy of w_router, 0 for none. Forward: as fp64, in which the
// logits are summed; backward: 16-bit weights as fp32.
int32_t widened_router_bytes(const Call& call);

// Bytes of the private panel of a thread: the most that any stage carves out of it.
int64_t panel_bytes(const Call& call, const TileConfig& tiles, int64_t element_bytes,
                    int64_t acc_bytes);

// Carves arrays out of a thread's panel, each on a cache line.
class Panel {
 public:
  explicit Panel(void* memory) : next_(static_cast<std::byte*>(memory)) {}
  template <class Type>
  Type* take(int64_t count) {
    Type* taken = reinterpret_cast<Type*>(next_);
    next_ += bytes_of(count * static_cast<int64_t>(sizeof(Type)));
    return taken;
  }
  static constexpr int64_t bytes_of(int64_t bytes) { return plan::align_up(bytes, 64); }

 private:
  std::byte* next_;
};

// Runs the call on this rank: all threads, all tasks. Collective over the group; grows the
// symmetric memory when a rank needs it. Throws Error.
void run_call(const Call& call, fabric::Group& group, Workspace& workspace, ThreadPool& pool,
              fm_stats& stats);

// Takes part in the peers' launch as a rank that cannot: they fail with FM_MISMATCH and `reason`.
void refuse_call(fabric::Group& group, const std::string& reason);

#define FM_FOR_EACH_DTYPE(X) X(double) X(float) X(bf16) X(fp16)

}  // namespace flashmoe::cpu
