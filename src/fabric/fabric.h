// A fabric gives a rank the addresses of every rank's control block and data part. The engines see
// nothing else of it. In order of preference: self (W = 1), threads of one process, processes over
// POSIX shared memory. A new fabric is one new file and one line in fabric/group.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fabric/control.h"

namespace flashmoe::fabric {

class Fabric {
 public:
  virtual ~Fabric() = default;
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  virtual const char* name() const = 0;
  virtual ControlBlock* control(int32_t rank) const = 0;
  // Base of `rank`'s data part, or null before the first growth.
  virtual std::byte* data(int32_t rank) const = 0;
  // False once `rank` is known to be gone for good: nothing that it has not written will come.
  virtual bool is_alive(int32_t) const { return true; }

  // The three steps of a collective growth; the group puts the waits between them.
  virtual void allocate(int64_t bytes, uint32_t generation) = 0;  // zeroed, this rank's new part
  virtual void map_peers(int64_t bytes, uint32_t generation) = 0;
  virtual void retire() = 0;  // all peers have mapped: drop names and the old parts

 protected:
  Fabric() = default;
};

std::vector<std::unique_ptr<Fabric>> make_thread_fabrics(int32_t world);
std::unique_ptr<Fabric> make_shm_fabric(const std::string& token, int32_t rank, int32_t world,
                                        double timeout_seconds);

}  // namespace flashmoe::fabric
