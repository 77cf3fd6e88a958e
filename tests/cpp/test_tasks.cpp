// The walk (ticket -> task) and the symmetric memory: order, dependencies, and who writes where.
#include <map>
#include <set>
#include <tuple>

#include "cluster.h"
#include "plan/tasks.h"

namespace flashmoe::test {
namespace {

using plan::Task;
using plan::TaskKind;
using plan::TaskSpace;
using Key = std::tuple<TaskKind, int64_t, int64_t>;

Key key_of(const Task& task) { return {task.kind, task.major, task.minor}; }

TaskSpace random_space(Rng& rng) {
  TaskSpace space;
  const auto few = [&](int64_t least = 0) {
    return rng.chance(0.2) ? least : rng.between(1, 7);
  };
  space.route_tiles = few();
  space.push_chunks = few();
  space.blocks = few();
  space.up_tiles = few(1);
  space.column_blocks = few(1);
  space.return_chunks = few();
  space.weight_tiles = few();
  space.combine_chunks = few();
  space.router_tiles = few();
  return space;
}

// Every task that must exist, listed without looking at the order.
std::set<Key> all_tasks(const TaskSpace& space) {
  std::set<Key> tasks{{TaskKind::kPlan, 0, 0}};
  const auto add = [&](TaskKind kind, int64_t majors, int64_t minors) {
    for (int64_t i = 0; i < majors; ++i) {
      for (int64_t j = 0; j < minors; ++j) tasks.insert({kind, i, j});
    }
  };
  add(TaskKind::kRoute, space.route_tiles, 1);
  add(TaskKind::kPush, space.push_chunks, 1);
  add(TaskKind::kUp, space.blocks, space.up_tiles);
  add(TaskKind::kDown, space.column_blocks, space.blocks);
  add(TaskKind::kReturn, space.column_blocks, space.return_chunks);
  add(TaskKind::kWeight, space.weight_tiles, 1);
  add(TaskKind::kCombine, space.combine_chunks, 1);
  add(TaskKind::kRouter, space.router_tiles, 1);
  return tasks;
}

TEST(Tasks, EveryTaskExactlyOnceAndThenTheEnd) {
  for_seeds(rounds(3000), [](Rng& rng) {
    const TaskSpace space = random_space(rng);
    std::set<Key> seen;
    for (int64_t ticket = 0; ticket < space.total(); ++ticket) {
      ASSERT_TRUE(seen.insert(key_of(plan::task_at(space, ticket))).second) << "ticket " << ticket;
    }
    ASSERT_EQ(seen, all_tasks(space));
    for (int64_t beyond = 0; beyond < 200; ++beyond) {
      ASSERT_EQ(plan::task_at(space, space.total() + beyond).kind, TaskKind::kEnd);
    }
  });
}

TEST(Tasks, TicketsPassTwoToTheThirtyOne) {
  TaskSpace space;
  space.route_tiles = 5;
  space.blocks = int64_t{1} << 20;
  space.up_tiles = 1 << 12;
  space.column_blocks = 1 << 12;
  space.return_chunks = int64_t{1} << 21;
  const int64_t first_down = 6 + (int64_t{1} << 32);
  EXPECT_EQ(key_of(plan::task_at(space, first_down - 1)),
            Key(TaskKind::kUp, space.blocks - 1, space.up_tiles - 1));
  EXPECT_EQ(key_of(plan::task_at(space, first_down)), Key(TaskKind::kDown, 0, 0));
  EXPECT_EQ(space.total(), first_down + (int64_t{1} << 12) * (3 * (int64_t{1} << 20)));
  EXPECT_EQ(key_of(plan::task_at(space, space.total() - 1)),
            Key(TaskKind::kReturn, space.column_blocks - 1, space.return_chunks - 1));
}

// What a task waits for on its own rank: the comments of plan/tasks.h and the stages, as a
// relation. position[b]: where block b stands in up_order. What it waits for from peers are flags
// (rows, partials, metadata); SimulatedRanksAllFinish follows those.
std::vector<Key> local_dependencies(const TaskSpace& space, const std::vector<int64_t>& position,
                                    const Task& task) {
  std::vector<Key> needed;
  const auto all = [&](TaskKind kind, int64_t count) {
    for (int64_t i = 0; i < count; ++i) needed.push_back({kind, i, 0});
  };
  const auto all_of_major = [&](TaskKind kind, int64_t major, int64_t count) {
    for (int64_t i = 0; i < count; ++i) needed.push_back({kind, major, i});
  };
  if (task.kind != TaskKind::kRoute && task.kind != TaskKind::kPlan) {
    needed.push_back({TaskKind::kPlan, 0, 0});
  }
  switch (task.kind) {
    case TaskKind::kPlan:
      all(TaskKind::kRoute, space.route_tiles);
      break;
    case TaskKind::kDown:
      all_of_major(TaskKind::kUp, position[static_cast<size_t>(task.minor)], space.up_tiles);
      if (task.major >= plan::kRingSlots) {  // the ring's slot is free
        all_of_major(TaskKind::kReturn, task.major - plan::kRingSlots, space.return_chunks);
      }
      break;
    case TaskKind::kReturn:
      all_of_major(TaskKind::kDown, task.major, space.blocks);
      break;
    case TaskKind::kWeight:
      for (int64_t b = 0; b < space.blocks; ++b) {
        all_of_major(TaskKind::kUp, b, space.up_tiles);
      }
      break;
    case TaskKind::kCombine:
      for (int64_t c = 0; c < space.column_blocks; ++c) {
        all_of_major(TaskKind::kReturn, c, space.return_chunks);
      }
      break;
    case TaskKind::kRouter:
      all(TaskKind::kCombine, space.combine_chunks);
      break;
    default:
      break;
  }
  return needed;
}

TEST(Tasks, DependOnlyOnEarlierTickets) {
  for_seeds(rounds(1500), [](Rng& rng) {
    const TaskSpace space = random_space(rng);
    std::vector<int64_t> position(static_cast<size_t>(space.blocks));
    for (size_t b = 0; b < position.size(); ++b) position[b] = static_cast<int64_t>(b);
    for (size_t b = 1; b < position.size(); ++b) {
      std::swap(position[b], position[static_cast<size_t>(rng.between(0, static_cast<int>(b)))]);
    }
    std::set<Key> earlier;
    for (int64_t ticket = 0; ticket < space.total(); ++ticket) {
      const Task task = plan::task_at(space, ticket);
      for (const Key& needed : local_dependencies(space, position, task)) {
        ASSERT_TRUE(earlier.count(needed))
            << "ticket " << ticket << " needs task kind " << static_cast<int>(std::get<0>(needed))
            << " (" << std::get<1>(needed) << ", " << std::get<2>(needed) << ")";
      }
      earlier.insert(key_of(task));
    }
  });
}

// Two column blocks are in the ring at any time: between `down c` and the last `return c`, nothing
// but column blocks c - 1 and c + 1 may be touched.
TEST(Tasks, TheRingHoldsTwoColumnBlocks) {
  for_seeds(rounds(500), [](Rng& rng) {
    const TaskSpace space = random_space(rng);
    std::map<int64_t, int64_t> slot_holds, returns_left;
    for (int64_t ticket = 0; ticket < space.total(); ++ticket) {
      const Task task = plan::task_at(space, ticket);
      const int64_t slot = task.major % plan::kRingSlots;
      if (task.kind == TaskKind::kDown && !slot_holds.count(slot)) slot_holds[slot] = task.major;
      if (task.kind == TaskKind::kDown && slot_holds[slot] != task.major) {
        ASSERT_EQ(returns_left[slot], 0) << "column block " << task.major << " enters a full slot";
        slot_holds[slot] = task.major;
      }
      if (task.kind == TaskKind::kDown) returns_left[slot] = space.return_chunks;
      if (task.kind == TaskKind::kReturn && space.blocks > 0) {
        ASSERT_EQ(slot_holds[slot], task.major);
        --returns_left[slot];
      }
    }
  });
}

// --- W ranks together -----------------------------------------------------------------------

constexpr plan::BlockShape kShape{.row_align = 8, .max_rows = 32};

// One rank of the cluster as its tasks see it.
struct RankTasks {
  TaskSpace space;
  std::vector<plan::Block> blocks;
  std::vector<int32_t> up_order;
  std::vector<std::set<std::pair<int32_t, int64_t>>> rows_from;  // [block]: (source, chunk)
  std::vector<int64_t> chunk_begin;                              // return chunks of the sources
};

RankTasks tasks_of(const Cluster& cluster, int32_t rank, int64_t column_blocks) {
  const plan::Problem& p = cluster.problems[rank];
  const Placed placed = place(cluster, rank, kShape.row_align);
  RankTasks tasks;
  tasks.blocks.resize(
      static_cast<size_t>(plan::max_blocks(placed.total, p.local_experts(), kShape)));
  tasks.blocks.resize(
      static_cast<size_t>(plan::make_blocks(p, kShape, placed.begin.data(), placed.rows.data(),
                                            placed.segments.data(), tasks.blocks.data())));
  tasks.up_order.resize(tasks.blocks.size());
  plan::sort_blocks_by_step(tasks.blocks.data(), static_cast<int64_t>(tasks.blocks.size()), p.world,
                            tasks.up_order.data());
  std::map<int64_t, std::pair<int32_t, int64_t>> chunk_of_row;
  for (int64_t e = 0; e < p.local_experts(); ++e) {
    for (int32_t step = 0; step < p.world; ++step) {
      const int32_t source = p.source_of_step(step);
      int64_t row = placed.segments[static_cast<size_t>(e * p.world + step)];
      for (const int64_t slot : cluster.kept_slots(source, rank * p.local_experts() + e)) {
        chunk_of_row[row++] = {source, slot / p.top_k / plan::kTileTokens};
      }
    }
  }
  for (const plan::Block& block : tasks.blocks) {
    auto& from = tasks.rows_from.emplace_back();
    for (int64_t r = 0; r < block.num_rows; ++r) {
      const auto chunk = chunk_of_row.at(block.row_begin + r);
      if (chunk.first != rank) from.insert(chunk);
    }
  }
  tasks.chunk_begin.assign(1, 0);
  for (const auto& source : cluster.problems) {
    tasks.chunk_begin.push_back(tasks.chunk_begin.back() + plan::num_chunks(source.tokens));
  }
  auto& space = tasks.space;
  space.route_tiles = space.push_chunks = space.combine_chunks = plan::num_chunks(p.tokens);
  space.blocks = static_cast<int64_t>(tasks.blocks.size());
  space.up_tiles = 2;
  space.column_blocks = column_blocks;
  space.return_chunks = tasks.chunk_begin.back();
  space.weight_tiles = p.local_experts();
  return tasks;
}

// W ranks of one thread each, every one taking its tickets in order and stopping at a flag that no
// task has raised yet. All must reach the end, in whatever order they are run.
TEST(Tasks, SimulatedRanksAllFinish) {
  for_seeds(rounds(300), [](Rng& rng) {
    const Cluster cluster(rng);
    const int32_t world = cluster.world();
    const int64_t column_blocks = rng.between(1, 4);
    std::vector<RankTasks> ranks;
    for (int32_t r = 0; r < world; ++r) ranks.push_back(tasks_of(cluster, r, column_blocks));
    std::vector<int64_t> ticket(static_cast<size_t>(world), 0);
    std::set<int32_t> announced;
    std::set<std::pair<int32_t, int64_t>> pushed;              // source, chunk
    std::set<std::tuple<int32_t, int32_t, int64_t>> returned;  // owner, source, chunk: last column
    const auto step = [&](int32_t rank) {
      const RankTasks& own = ranks[static_cast<size_t>(rank)];
      const Task task = plan::task_at(own.space, ticket[static_cast<size_t>(rank)]);
      switch (task.kind) {
        case TaskKind::kEnd:
          return false;
        case TaskKind::kPlan:  // announces itself, then waits for all
          announced.insert(rank);
          if (static_cast<int32_t>(announced.size()) < world) return false;
          break;
        case TaskKind::kPush:
          pushed.insert({rank, task.major});
          break;
        case TaskKind::kUp:
          for (const auto& chunk :
               own.rows_from[static_cast<size_t>(own.up_order[static_cast<size_t>(task.major)])]) {
            if (!pushed.count(chunk)) return false;
          }
          break;
        case TaskKind::kReturn:
          if (task.major + 1 == column_blocks) {
            int32_t source = 0;
            while (own.chunk_begin[static_cast<size_t>(source) + 1] <= task.minor) ++source;
            returned.insert(
                {rank, source, task.minor - own.chunk_begin[static_cast<size_t>(source)]});
          }
          break;
        case TaskKind::kCombine:
          for (int32_t owner = 0; owner < world; ++owner) {
            if (!returned.count({owner, rank, task.major})) return false;
          }
          break;
        default:
          break;
      }
      ++ticket[static_cast<size_t>(rank)];
      return true;
    };
    for (bool moved = true; moved;) {
      moved = false;
      const int32_t first = rng.between32(0, world - 1);
      for (int32_t i = 0; i < world; ++i) {
        for (int64_t n = rng.between(1, 50); n > 0 && step((first + i) % world); --n) moved = true;
      }
    }
    for (int32_t r = 0; r < world; ++r) {
      ASSERT_EQ(ticket[static_cast<size_t>(r)], ranks[static_cast<size_t>(r)].space.total());
    }
  });
}

// --- who writes where -----------------------------------------------------------------------

// Byte ranges of one rank's symmetric memory with their writers.
class Writes {
 public:
  void add(const plan::Region& region, int64_t first, int64_t bytes, const std::string& writer) {
    ASSERT_GE(first, 0) << writer;
    ASSERT_LE(first + bytes, region.bytes) << writer << " leaves " << region.name;
    if (bytes > 0)
      ranges_.push_back({region.offset + first, region.offset + first + bytes, writer});
  }
  void expect_disjoint() {
    std::sort(ranges_.begin(), ranges_.end());
    for (size_t i = 1; i < ranges_.size(); ++i) {
      ASSERT_LE(std::get<1>(ranges_[i - 1]), std::get<0>(ranges_[i]))
          << std::get<2>(ranges_[i - 1]) << " and " << std::get<2>(ranges_[i]);
    }
  }

 private:
  std::vector<std::tuple<int64_t, int64_t, std::string>> ranges_;
};

// The metadata that `source` writes to an owner in the bank of `epoch`.
void add_metadata(Writes& writes, const plan::SymmetricShape& shape, int32_t source, int64_t slots,
                  plan::Epoch epoch) {
  const auto table = plan::symmetric_table(shape);
  const std::string name =
      "metadata of rank " + std::to_string(source) + ", epoch " + std::to_string(epoch);
  writes.add(table[plan::Symmetric::kCounts], plan::counts_index(shape, epoch, source) * 4,
             shape.local_experts * 4, name);
  const auto record = static_cast<int64_t>(sizeof(plan::SlotRecord));
  writes.add(table[plan::Symmetric::kSlots], plan::slots_index(shape, epoch, source) * record,
             slots * record, name);
}

// Rows and flags that `source` pushes to `owner`.
void add_pushes(Writes& writes, const Cluster& cluster, const plan::SymmetricShape& shape,
                int32_t owner, int32_t source) {
  const auto table = plan::symmetric_table(shape);
  const plan::Problem& p = cluster.problems[source];
  const int64_t row_bytes = p.hidden * shape.element_bytes;
  std::set<int64_t> tokens;
  for (int64_t s = 0; s < p.slots(); ++s) {
    if (cluster.kept[source][s] && p.owner_of(cluster.ids[source][s]) == owner) {
      tokens.insert(s / p.top_k);
    }
  }
  const std::string name = "push of rank " + std::to_string(source);
  for (const int64_t token : tokens) {
    const int64_t first = (source * shape.token_cap + token) * row_bytes;
    writes.add(table[plan::Symmetric::kRecvX], first, row_bytes, name);
    if (shape.backward) writes.add(table[plan::Symmetric::kRecvGrad], first, row_bytes, name);
  }
  for (int64_t chunk = 0; chunk < plan::num_chunks(p.tokens); ++chunk) {
    writes.add(table[plan::Symmetric::kPushFlags], plan::push_flag_index(shape, source, chunk) * 4,
               4, name);
  }
}

// Partial sums, slot gradients and flags that `owner` returns to `source`.
void add_returns(Writes& writes, const Cluster& cluster, const plan::SymmetricShape& shape,
                 int32_t owner, int32_t source) {
  const auto table = plan::symmetric_table(shape);
  const plan::Problem& p = cluster.problems[source];
  const int64_t width = p.hidden / shape.column_blocks;
  const std::string name = "return of rank " + std::to_string(owner);
  std::set<int64_t> tokens;
  for (int64_t s = 0; s < p.slots(); ++s) {
    if (!cluster.kept[source][s] || p.owner_of(cluster.ids[source][s]) != owner) continue;
    tokens.insert(s / p.top_k);
    if (shape.backward) {
      writes.add(table[plan::Symmetric::kSlotGrad], s * shape.acc_bytes, shape.acc_bytes, name);
    }
  }
  for (int64_t c = 0; c < shape.column_blocks; ++c) {
    const int64_t begin = c * width;
    const int64_t columns = c + 1 == shape.column_blocks ? p.hidden - begin : width;
    for (const int64_t token : tokens) {
      const int64_t first = (owner * shape.token_cap + token) * p.hidden + begin;
      writes.add(table[plan::Symmetric::kPartial], first * shape.element_bytes,
                 columns * shape.element_bytes, name);
    }
    for (int64_t chunk = 0; chunk < plan::num_chunks(p.tokens); ++chunk) {
      writes.add(table[plan::Symmetric::kReturnFlags],
                 plan::return_flag_index(shape, owner, c, chunk) * 4, 4, name);
    }
  }
}

int64_t kept_for(const Cluster& cluster, int32_t source, int32_t owner) {
  const auto counts = cluster.counts(owner);
  const int64_t experts = cluster.problems[owner].local_experts();
  int64_t sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += counts[static_cast<size_t>(source * experts + e)];
  return sum;
}

// Everything written into one rank's memory in a launch, and the metadata of the launch after it
// (a peer may be one launch ahead, with another layer), hits different bytes.
TEST(SymmetricMemory, NoTwoWritersOfOneWord) {
  for_seeds(rounds(400), [](Rng& rng) {
    plan::Problem sizes = random_problem(rng);
    sizes.world = rng.between32(2, 4);
    const auto layer = [&] {
      sizes.hidden = rng.between(1, 40);
      sizes.num_experts = sizes.world * rng.between(1, 6);
      sizes.top_k = rng.between(1, std::min<int64_t>(sizes.num_experts, 4));
    };
    layer();
    const Cluster now(rng, sizes);
    layer();
    const Cluster next(rng, sizes);
    const bool backward = rng.chance(0.5);
    auto shape = symmetric_shape(now.problems[0], 150, rng.pick<int32_t>({2, 4, 8}), backward);
    shape.column_blocks = std::min<int64_t>(rng.between(1, 3), now.problems[0].hidden);
    shape.flag_words = plan::needed_flag_words(shape.world, shape.token_cap, shape.column_blocks);
    auto next_shape = symmetric_shape(next.problems[0], 150, shape.element_bytes, backward);
    share_capacity(shape, next_shape);
    const plan::Epoch epoch = rng.pick<plan::Epoch>({2u, 7u, 0xfffffffeu, 0xffffffffu});
    for (int32_t rank = 0; rank < sizes.world; ++rank) {
      Writes writes;
      for (int32_t peer = 0; peer < sizes.world; ++peer) {
        add_returns(writes, now, shape, peer, rank);
        if (peer == rank) continue;
        add_pushes(writes, now, shape, rank, peer);
        add_metadata(writes, shape, peer, kept_for(now, peer, rank), epoch);
        add_metadata(writes, next_shape, peer, kept_for(next, peer, rank), plan::next_epoch(epoch));
      }
      writes.expect_disjoint();
      if (testing::Test::HasFailure()) return;
    }
  });
}

}  // namespace
}  // namespace flashmoe::test
