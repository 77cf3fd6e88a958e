#include "fabric/control.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace flashmoe::fabric {
namespace {

// Inode of the process's PID namespace: process numbers compare only inside one. 0: not known.
uint64_t own_process_space() {
  struct stat info {};
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

}  // namespace

void set_text(char (&target)[kTextBytes], const std::string& text) {
  const size_t length = std::min(text.size(), static_cast<size_t>(kTextBytes - 1));
  std::memcpy(target, text.data(), length);
  target[length] = '\0';
}

void introduce(ControlBlock& block, int32_t world) {
  const std::string build =
      std::string(fm_version()) + ", control block of " + std::to_string(sizeof(ControlBlock));
  std::strncpy(block.build, build.c_str(), sizeof(block.build) - 1);
  block.world = world;
  block.process = getpid();
  block.process_space = own_process_space();
  block.hello.store(kControlMagic, std::memory_order_release);
}

void check_introduction(const ControlBlock& peer_block, int32_t peer, const ControlBlock& own_block,
                        int32_t rank) {
  if (std::strncmp(peer_block.build, own_block.build, sizeof(own_block.build)) != 0) {
    const std::string peer_build(peer_block.build,
                                 strnlen(peer_block.build, sizeof(peer_block.build)));
    fail(FM_MISMATCH, "build differs between ranks: rank ", peer, " runs '", peer_build, "', rank ",
         rank, " runs '", own_block.build, "': install the same flashmoe on all ranks");
  }
  if (peer_block.world != own_block.world) {
    fail(FM_MISMATCH, "world differs between ranks: rank ", peer, " makes a group of ",
         peer_block.world, " ranks, rank ", rank, " one of ", own_block.world);
  }
}

bool stop_owner(ControlBlock& block, fm_status status, const std::string& reason) {
  auto none = static_cast<uint32_t>(AbortState::kNone);
  const auto writing = static_cast<uint32_t>(AbortState::kWriting);
  if (!block.abort.compare_exchange_strong(none, writing, std::memory_order_acq_rel)) return false;
  block.abort_status = status;
  set_text(block.abort_text, reason);
  block.abort.store(static_cast<uint32_t>(AbortState::kSet), std::memory_order_release);
  return true;
}

void check_stopped(const ControlBlock& block) {
  const auto state = block.abort.load(std::memory_order_acquire);
  if (state != static_cast<uint32_t>(AbortState::kSet)) return;
  fail(FM_ABORTED, "the group was aborted: ", block.abort_text, "; make a new group to go on");
}

}  // namespace flashmoe::fabric
