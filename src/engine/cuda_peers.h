// A group of processes as the CUDA engine sees it.
#pragma once

#include <memory>

#include "cuda/engine/peers.h"
#include "fabric/group.h"

namespace flashmoe::engine {

// `group` has to outlive it.
std::unique_ptr<cuda::Peers> make_cuda_peers(fabric::Group& group);

}  // namespace flashmoe::engine
