// Checks of what a caller passes: each names the argument, what was given and what is accepted.
#pragma once

#include <initializer_list>
#include <string>

#include "cpu/call.h"
#include "fabric/group.h"

namespace flashmoe::engine {

// Throws FM_INVALID_VALUE when the layer makes no sense on `world` ranks.
void check_layer(const fm_layer& layer, int32_t world);
// Throws FM_INVALID_VALUE unless a rank may have this many tokens.
void check_tokens(int64_t tokens, int64_t top_k);

// Checks every operand against the layer and gives the call as the engines take it. Throws
// FM_INVALID_VALUE or FM_INVALID_TYPE before anything has been touched.
cpu::Call make_forward_call(const fabric::Group& group, const fm_layer& layer,
                            const fm_forward_args& args);
cpu::Call make_backward_call(const fabric::Group& group, const fm_layer& layer,
                             const fm_backward_args& args);

}  // namespace flashmoe::engine
