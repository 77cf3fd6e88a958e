#include "fabric/group.h"

#include <unistd.h>

#include <new>

namespace flashmoe::fabric {
namespace {

struct HeaderField {
  const char* name;
  double (*read)(const CallHeader&);
};

// One line a field; a new field of CallHeader that must agree is one line here.
constexpr HeaderField kHeaderFields[] = {
    {"operation (1 forward, 2 backward)",
     [](const CallHeader& h) -> double {
       return h.operation;
     }},
    {"dtype",
     [](const CallHeader& h) {
       return static_cast<double>(h.dtype);
     }},
    {"hidden size",
     [](const CallHeader& h) {
       return static_cast<double>(h.hidden);
     }},
    {"intermediate size",
     [](const CallHeader& h) {
       return static_cast<double>(h.intermediate);
     }},
    {"num_experts",
     [](const CallHeader& h) {
       return static_cast<double>(h.num_experts);
     }},
    {"top_k",
     [](const CallHeader& h) {
       return static_cast<double>(h.top_k);
     }},
    {"activation",
     [](const CallHeader& h) {
       return static_cast<double>(h.activation);
     }},
    {"gated",
     [](const CallHeader& h) {
       return static_cast<double>(h.gated);
     }},
    {"weight_on_input",
     [](const CallHeader& h) {
       return static_cast<double>(h.weight_on_input);
     }},
    {"activation alpha",
     [](const CallHeader& h) {
       return h.act_alpha;
     }},
    {"activation limit",
     [](const CallHeader& h) {
       return h.act_limit;
     }},
    {"activation up_offset",
     [](const CallHeader& h) {
       return h.up_offset;
     }},
    {"capacity_factor",
     [](const CallHeader& h) {
       return h.capacity_factor;
     }},
    {"layer_id",
     [](const CallHeader& h) {
       return static_cast<double>(h.layer_id);
     }},
};

}  // namespace

Group::Group(std::unique_ptr<Fabric> fabric, int32_t rank, int32_t world, GroupOptions options)
    : fabric_(std::move(fabric)),
      rank_(rank),
      world_(world),
      options_(options),
      owner_process_(getpid()) {}

LaunchTurn::LaunchTurn(Group& group) : group_(group) {
  if (group.world() > 1) {
    if (getpid() != group.owner_process_) {
      fail(FM_UNSUPPORTED, "the group of ", group.world(),
           " ranks was made before this process was forked: make a new group in the child");
    }
    if (group.launching_.exchange(true, std::memory_order_acquire)) {
      const Error error(FM_UNSUPPORTED,
                        "two threads of rank " + std::to_string(group.rank()) +
                            " call the same group at once, so that the ranks could not agree whose "
                            "call comes first: give each thread a group of its own");
      group.abort(error.status(), error.what());
      throw error;
    }
  }
  lock_ = std::unique_lock(group.launch_mutex());
}

LaunchTurn::~LaunchTurn() {
  if (group_.world() > 1) group_.launching_.store(false, std::memory_order_release);
}

void Group::connect(const Waiter& waiter) {
  if (world_ == 1 || connected_) return;
  grow({.bytes = 4096}, waiter);
  connected_ = true;
}

void Group::set_epoch(plan::Epoch epoch) {
  if (epoch_ != 0) fail(FM_INVALID_VALUE, "epoch: can only be set before the first launch");
  epoch_ = epoch;
  finish_epoch(epoch);
}

void Group::wait_for_credit(plan::Epoch epoch, const Waiter& waiter) const {
  for (int32_t peer = 0; peer < world_; ++peer) {
    if (peer == rank_) continue;
    waiter.until(own_control().done[peer],
                 [epoch](uint32_t done) { return plan::has_credit(done, epoch); },
                 plan::credit_epoch(epoch), {"the credit", "plan", peer, epoch});
  }
}

void Group::write_header(plan::Epoch epoch, const CallHeader& header) {
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).header[plan::bank_of(epoch)][rank_] = header;
  }
}

void Group::publish_metadata(plan::Epoch epoch) {
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).meta_ready[plan::bank_of(epoch)][rank_].store(epoch, std::memory_order_release);
  }
}

void Group::wait_for_metadata(plan::Epoch epoch, const Waiter& waiter) const {
  for (int32_t peer = 0; peer < world_; ++peer) {
    waiter.until_equal(own_control().meta_ready[plan::bank_of(epoch)][peer], epoch,
                       {"the metadata", "plan", peer, epoch});
  }
}

void Group::finish_epoch(plan::Epoch epoch) {
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).done[rank_].store(epoch, std::memory_order_release);
  }
}

void Group::grow(const plan::SymmetricCapacity& capacity, const Waiter& waiter) {
  try {
    grow_together(capacity, waiter);
  } catch (const Error& error) {
    if (error.status() != FM_ABORTED) abort(error.status(), error.what());
    throw;
  } catch (const std::bad_alloc&) {
    const Error error(FM_OUT_OF_MEMORY, "rank " + std::to_string(rank_) + " has no memory for " +
                                            std::to_string(capacity.bytes) + " symmetric bytes");
    abort(error.status(), error.what());
    throw error;
  }
}

void Group::grow_together(const plan::SymmetricCapacity& capacity, const Waiter& waiter) {
  const uint32_t generation = ++generation_;
  fabric_->allocate(capacity.bytes, generation);
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).grow_ready[rank_].store(generation, std::memory_order_release);
  }
  for (int32_t peer = 0; peer < world_; ++peer) {
    waiter.until_equal(own_control().grow_ready[peer], generation,
                       {"new memory", "grow", peer, epoch_});
  }
  fabric_->map_peers(capacity.bytes, generation);
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).grow_mapped[rank_].store(generation, std::memory_order_release);
  }
  for (int32_t peer = 0; peer < world_; ++peer) {
    waiter.until_equal(own_control().grow_mapped[peer], generation,
                       {"mapped memory", "grow", peer, epoch_});
  }
  fabric_->retire();
  capacity_ = capacity;
}

std::vector<Message> Group::gather(const Message& own, const Waiter& waiter) {
  try {
    return gather_together(own, waiter);
  } catch (const Error& error) {
    if (error.status() != FM_ABORTED) abort(error.status(), error.what());
    throw;
  }
}

std::vector<Message> Group::gather_together(const Message& own, const Waiter& waiter) {
  const uint32_t number = ++gathers_;
  const int bank = plan::bank_of(number);
  for (int32_t peer = 0; peer < world_; ++peer) {
    control(peer).message[bank][rank_] = own;
    control(peer).told[bank][rank_].store(number, std::memory_order_release);
  }
  std::vector<Message> all;
  for (int32_t peer = 0; peer < world_; ++peer) {
    waiter.until_equal(own_control().told[bank][peer], number,
                       {"the message", "gather", peer, epoch_});
    all.push_back(own_control().message[bank][peer]);
  }
  waiter.check_abort();
  return all;
}

void Group::abort(fm_status status, const std::string& reason) {
  for (int32_t peer = 0; peer < world_; ++peer) stop_owner(control(peer), status, reason);
  if (abort_hook_) abort_hook_();
}

void check_headers(const Group& group, plan::Epoch epoch) {
  const CallHeader& own = group.header_of(epoch, group.rank());
  for (int32_t peer = 0; peer < group.world(); ++peer) {
    const CallHeader& header = group.header_of(epoch, peer);
    if (header.status == static_cast<uint32_t>(CallStatus::kRefused)) {
      fail(FM_MISMATCH, "rank ", peer, " refused the call: ", header.text);
    }
    for (const HeaderField& field : kHeaderFields) {
      if (field.read(header) == field.read(own)) continue;
      fail(FM_MISMATCH, field.name, " differs between ranks: ", field.read(header), " on rank ",
           peer, ", ", field.read(own), " on rank ", group.rank());
    }
  }
}

}  // namespace flashmoe::fabric
