// File descriptors from process to process: how ranks give each other memory that has no name.
#pragma once

#include <vector>

#include "base/file.h"
#include "fabric/group.h"

namespace flashmoe::fabric {

// Collective: every rank gives an open file and gets those of all others, by rank; its own place is
// closed. Over Unix sockets in the abstract namespace, whose random names travel by Group::gather.
// Bounded as a wait of `waiter` for a peer is: the end of a peer's process, an abort and
// `timeout_seconds` (0: none) end it. A rank that fails aborts the group. Throws FM_UNSUPPORTED
// where the ranks do not share a network namespace, else as a wait does.
std::vector<File> exchange_descriptors(Group& group, const File& own, const Waiter& waiter,
                                       double timeout_seconds);

}  // namespace flashmoe::fabric
