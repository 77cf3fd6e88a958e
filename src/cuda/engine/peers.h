// What the CUDA engine asks of a group whose ranks are processes: to agree once, when memory is
// made. Launches use none of it. Needs neither CUDA nor the fabrics.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/file.h"

namespace flashmoe::cuda {

class Peers {
 public:
  using Message = std::array<std::byte, 256>;

  virtual ~Peers() = default;

  virtual int32_t rank() const = 0;
  virtual int32_t world() const = 0;
  // Collective: every rank gives a message and gets those of all, by rank. Bounded by the group's
  // timeout; throws Error FM_TIMEOUT or FM_ABORTED, and the group is then aborted.
  virtual std::vector<Message> gather(const Message& own) = 0;
  // Collective, bounded likewise: every rank gives an open file and gets those of the others.
  virtual std::vector<File> exchange(const File& own) = 0;
};

}  // namespace flashmoe::cuda
