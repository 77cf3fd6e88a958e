#include "engine/cuda_peers.h"

#include <type_traits>

#include "fabric/descriptors.h"

namespace flashmoe::engine {
namespace {

static_assert(std::is_same_v<cuda::Peers::Message, fabric::Message>);

class GroupPeers final : public cuda::Peers {
 public:
  explicit GroupPeers(fabric::Group& group) : group_(group) {}

  int32_t rank() const override { return group_.rank(); }
  int32_t world() const override { return group_.world(); }
  std::vector<Message> gather(const Message& own) override {
    return group_.gather(own, group_.waiter());
  }
  std::vector<File> exchange(const File& own) override {
    return fabric::exchange_descriptors(group_, own, group_.waiter(),
                                        group_.options().timeout_seconds);
  }

 private:
  fabric::Group& group_;
};

}  // namespace

std::unique_ptr<cuda::Peers> make_cuda_peers(fabric::Group& group) {
  return std::make_unique<GroupPeers>(group);
}

}  // namespace flashmoe::engine
