// The ranks of a group on CUDA: who has which device, and the symmetric memory of all of them.
// Needs no CUDA header: a build without CUDA has the same functions, which say so.
#pragma once

#include <cstdint>
#include <memory>

#include "base/error.h"
#include "cuda/engine/peers.h"

namespace flashmoe::cuda {

class RankMemory;  // cuda/fabric/rank_memory.h

// An error that leaves all ranks in step: all have it, or it is of a launch that came to its end.
class HarmlessError : public Error {
 public:
  using Error::Error;
  explicit HarmlessError(const Error& error) : Error(error) {}
};

// What the memory of a group has to hold: the largest launch of any rank. Equal on all ranks once
// the memory is made.
struct RankNeeds {
  int64_t tokens = 0;  // of a rank
  int64_t hidden = 0;
  int64_t top_k = 0;
  int64_t local_experts = 0;
};

// Where a rank launches.
struct RankPlace {
  int32_t rank = 0;
  int32_t device = 0;
  int32_t max_sms = 0;  // 0: all
  bool capturing = false;
};

class RankGroup {
 public:
  virtual ~RankGroup() = default;

  virtual int32_t world() const = 0;

  // The memory for launches of these needs. The first call makes it: collective among processes;
  // among ranks of one process it makes that of all ranks and waits for none. Later calls neither
  // communicate nor wait. Throws Error FM_INVALID_VALUE when more is needed than the memory was
  // made for (it says how to reserve that), when it would have to be made inside a graph capture
  // and when the device is not the rank's; FM_UNSUPPORTED when ranks that share a device would wait
  // for its multiprocessors; FM_ABORTED after stop(), which may come while the memory is made.
  // Memory that cannot be made is a HarmlessError of every rank's call: FM_UNSUPPORTED beyond the
  // limits (config/rank_limits.h), which are looked at first, or where devices cannot reach each
  // other; FM_OUT_OF_MEMORY.
  virtual std::shared_ptr<RankMemory> memory(const RankPlace& place, const RankNeeds& needs) = 0;

  // Grows what memory() gives to hold these needs too, 0 meaning whatever it is. Before there is
  // memory it is only noted; after that it is collective among processes, and no launch of the
  // group may be on its way: it waits for all that the ranks' devices do. Throws as memory() does;
  // after a HarmlessError the memory is as it was.
  virtual void reserve(int32_t rank, const RankNeeds& needs) = 0;

  // What memory() of a call of these needs has, or would be made for if no rank needs more.
  virtual RankNeeds planned(const RankNeeds& needs) = 0;

  // The device of a rank of this process, before the memory is made. Throws FM_INVALID_VALUE later.
  virtual void set_device(int32_t rank, int32_t device) = 0;
  // The epoch that the first launch of a rank of this process follows (plan/flags.h), the same for
  // all ranks; before the memory is made. Throws FM_INVALID_VALUE later.
  virtual void set_epoch(int32_t rank, uint32_t epoch) = 0;

  // Ends all waits of all ranks' launches, and of those to come. Any thread.
  virtual void stop(int32_t rank) noexcept = 0;

  // Symmetric memory of one rank.
  virtual int64_t bytes() = 0;
};

// Ranks of this process; give the same one to the engines of all of them. By default rank r has the
// device r.
std::shared_ptr<RankGroup> make_local_ranks(int32_t world);
// One rank of several processes; its engine alone has it.
std::shared_ptr<RankGroup> make_process_ranks(std::unique_ptr<Peers> peers);

}  // namespace flashmoe::cuda
