// The forward of few tokens on one rank: kernel/decode.cuh.
#pragma once

#include <string>

#include "cuda/launch/forward.h"

namespace flashmoe::cuda::launch {

// Whether a forward runs as that kernel: one rank, at most config::Decode::kTokens tokens, weights
// whose k are contiguous, weights of slots that count behind the experts, and no z.
bool is_decode(const fm_layer& layer, const fm_forward_args& operands, const RankArguments& ranks);

// As describe_forward() and launch_forward().
std::string describe_decode(const fm_layer& layer, const fm_forward_args& operands,
                            int32_t num_sms);
void launch_decode(const ForwardArguments& arguments);

}  // namespace flashmoe::cuda::launch
