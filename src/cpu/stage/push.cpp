#include <cstring>

#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

// One token row to every peer in the mask, read once.
template <class T>
void push_row(const Launch<T>& launch, const fm_tensor& own, plan::Symmetric region,
              int64_t token_idx, uint64_t mask) {
  const auto& p = launch.problem;
  const T* row = row_of<const T>(own, token_idx);
  const int64_t place = (p.rank * launch.symmetric_shape.token_cap + token_idx) * p.hidden;
  for (int32_t peer = 0; peer < p.world; ++peer) {
    if (peer == p.rank || ((mask >> peer) & 1) == 0) continue;
    std::memcpy(launch.template symmetric_at<T>(peer, region) + place, row,
                static_cast<size_t>(p.hidden) * sizeof(T));
  }
}

}  // namespace

template <class T>
void push_chunk(Launch<T>& launch, int64_t chunk) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const auto* masks = launch.template route_at<uint64_t>(plan::RouteScratch::kDestinations);
  const int64_t begin = chunk * plan::kTileTokens;
  const int64_t end = plan::min_of(begin + plan::kTileTokens, p.tokens);
  for (int64_t t = begin; t < end; ++t) {
    push_row(launch, ops.x, plan::Symmetric::kRecvX, t, masks[t]);
    if (launch.call.backward) {
      push_row(launch, ops.grad_y, plan::Symmetric::kRecvGrad, t, masks[t]);
    }
  }
  for (int32_t step = 1; step < p.world; ++step) {
    const int32_t peer = p.source_of_step(step);
    auto* flags =
        launch.template symmetric_at<std::atomic<uint32_t>>(peer, plan::Symmetric::kPushFlags);
    flags[plan::push_flag_index(launch.symmetric_shape, p.rank, chunk)].store(
        launch.epoch, std::memory_order_release);
  }
}

#define FM_INSTANTIATE(T) template void push_chunk<T>(Launch<T>&, int64_t);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
