// Ranks as processes of one machine over POSIX shared memory.
//
// Every segment lives under a name only while its peers open it: "/flashmoe-<token>-<rank>" for the
// control block and "....g<generation>" for a data part. Once all ranks have mapped it the owner
// unlinks it, so that whatever happens to the processes later, nothing stays behind. The owner
// holds a lock on the file while it has a name: a name whose lock is free was left by a process
// that died in between, and the next rank that makes a group on this machine removes it.
#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "fabric/fabric.h"
#include "fabric/wait.h"

namespace flashmoe::fabric {
namespace {

constexpr char kPrefix[] = "flashmoe-";
constexpr std::chrono::microseconds kJoinSleep{1000};

// A mapped segment; the creator also owns the name until drop_name().
class Segment {
 public:
  Segment() = default;
  Segment(Segment&& other) noexcept { *this = std::move(other); }
  Segment& operator=(Segment&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    std::swap(lock_, other.lock_);
    return *this;
  }
  ~Segment() {
    drop_name();
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }

  static Segment create(const std::string& name, size_t bytes) {
    Segment segment;
    segment.name_ = name;
    segment.lock_ = create_locked(name);
    // posix_fallocate, not ftruncate: a full /dev/shm is an error here and not a SIGBUS later.
    int error = 0;
    do {
      error = posix_fallocate(segment.lock_.get(), 0, static_cast<off_t>(bytes));
    } while (error == EINTR);
    if (error == 0) segment.map(segment.lock_.get(), bytes);
    if (error != 0 || segment.memory_ == nullptr) {
      fail(FM_OUT_OF_MEMORY, "shared memory ", name, ": no room for ", bytes,
           " bytes; enlarge /dev/shm or use fewer tokens");
    }
    return segment;
  }

  // The whole of a segment of `least` bytes or more. Null memory when the name does not exist (yet)
  // or is not complete.
  static Segment open(const std::string& name, size_t least) {
    Segment segment;
    const File file(shm_open(name.c_str(), O_RDWR, 0600));
    struct stat info {};
    if (file.is_open() && fstat(file.get(), &info) == 0 &&
        static_cast<size_t>(info.st_size) >= least) {
      segment.name_ = name;
      segment.map(file.get(), static_cast<size_t>(info.st_size));
    }
    return segment;
  }

  void drop_name() {
    if (lock_.is_open()) shm_unlink(name_.c_str());
    lock_ = File();
  }
  std::byte* memory() const { return static_cast<std::byte*>(memory_); }

 private:
  // A new file under the name, locked. Between its creation and its lock the file looks like one
  // that was left behind: when somebody has removed it as such, it is made again.
  static File create_locked(const std::string& name) {
    while (true) {
      File file(shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600));
      if (!file.is_open()) {
        fail(errno == EEXIST ? FM_INVALID_VALUE : FM_OUT_OF_MEMORY, "shared memory ", name, ": ",
             std::strerror(errno), "; a group's token must be new, and /dev/shm writable");
      }
      struct stat info {};
      if (flock(file.get(), LOCK_EX) == 0 && fstat(file.get(), &info) == 0 && info.st_nlink > 0) {
        return file;
      }
    }
  }

  void map(int file, size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return;
    memory_ = memory;
    bytes_ = bytes;
  }

  std::string name_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
  File lock_;  // of the creator, while the segment has its name
};

// Removes the names that dead processes have left. Those of others' are none of our business.
void remove_orphans() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm", error)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(kPrefix, 0) != 0) continue;
    const File file(shm_open(("/" + name).c_str(), O_RDWR, 0600));
    if (!file.is_open() || flock(file.get(), LOCK_EX | LOCK_NB) != 0) continue;
    struct stat info {};
    // What has lost its name in the meantime may have given it to a new owner.
    if (fstat(file.get(), &info) == 0 && info.st_nlink > 0) shm_unlink(("/" + name).c_str());
  }
}

class ShmFabric final : public Fabric {
 public:
  ShmFabric(std::string token, int32_t rank, int32_t world, double timeout_seconds)
      : token_(std::move(token)),
        rank_(rank),
        controls_(world),
        data_(world),
        grown_(world),
        processes_(world),
        gone_(world) {
    remove_orphans();
    controls_[rank] = Segment::create(name_of(rank), sizeof(ControlBlock));
    introduce(*new (controls_[rank].memory()) ControlBlock(), world);
    try {
      double waited = 0;
      for (int32_t peer = 0; peer < world; ++peer) {
        if (peer != rank) meet(peer, timeout_seconds, waited);
      }
    } catch (const Error& error) {
      // What this rank tells those that it has met, the others learn from them.
      for (const Segment& segment : controls_) {
        if (segment.memory() != nullptr)
          stop_owner(*block_of(segment), error.status(), error.what());
      }
      throw;
    }
  }

  const char* name() const override { return "shm"; }
  ControlBlock* control(int32_t rank) const override { return block_of(controls_[rank]); }
  std::byte* data(int32_t rank) const override { return data_[rank].memory(); }

  bool is_alive(int32_t rank) const override {
    if (gone_[rank]) return false;
    if (!processes_[rank].is_open()) return true;  // not known
    pollfd process{.fd = processes_[rank].get(), .events = POLLIN, .revents = 0};
    return poll(&process, 1, 0) <= 0;  // readable once the process has ended
  }

  void allocate(int64_t bytes, uint32_t generation) override {
    grown_[rank_] = Segment::create(name_of(rank_, generation), static_cast<size_t>(bytes));
  }
  void map_peers(int64_t bytes, uint32_t generation) override {
    for (int32_t peer = 0; peer < static_cast<int32_t>(grown_.size()); ++peer) {
      if (peer == rank_) continue;
      grown_[peer] = Segment::open(name_of(peer, generation), static_cast<size_t>(bytes));
      if (grown_[peer].memory() == nullptr) {
        fail(FM_INTERNAL, "rank ", rank_, " cannot map ", bytes, " bytes of rank ", peer);
      }
    }
    data_.swap(grown_);
  }
  void retire() override {
    data_[rank_].drop_name();
    controls_[rank_].drop_name();
    for (auto& segment : grown_) segment = Segment();
  }

 private:
  static ControlBlock* block_of(const Segment& segment) {
    return reinterpret_cast<ControlBlock*>(segment.memory());
  }
  std::string name_of(int32_t rank) const {
    return std::string("/") + kPrefix + token_ + "-" + std::to_string(rank);
  }
  std::string name_of(int32_t rank, uint32_t generation) const {
    return name_of(rank) + ".g" + std::to_string(generation);
  }

  // Waits for the peer's block and checks that it is one of the same group and build. `waited`: of
  // all peers so far; they share one bound.
  void meet(int32_t peer, double timeout, double& waited) {
    const double before = waited;
    spin_until(
        [&] {
          controls_[peer] = Segment::open(name_of(peer), kHeadBytes);
          return controls_[peer].memory() != nullptr &&
                 control(peer)->hello.load(std::memory_order_acquire) == kControlMagic;
        },
        [&](const Backoff& backoff) {
          check_stopped(*control(rank_));
          waited = before + backoff.seconds();
          if (timeout <= 0 || waited < timeout) return;
          fail(FM_TIMEOUT, "rank ", rank_, " waited ", timeout, " s for rank ", peer,
               " to join the group '", token_, "'. Do all ranks make it, with the same token?");
        },
        kJoinSleep);
    check_introduction(*control(peer), peer, *control(rank_), rank_);
    watch(peer);
  }

  // A process can be watched from inside its own PID namespace, where the kernel can and may.
  void watch(int32_t peer) {
    const ControlBlock &own = *control(rank_), &other = *control(peer);
    const bool known = own.process_space != 0 && own.process_space == other.process_space;
    if (!known || own.process == other.process) return;
    processes_[peer] = File(static_cast<int>(syscall(SYS_pidfd_open, other.process, 0)));
    gone_[peer] = !processes_[peer].is_open() && errno == ESRCH;
  }

  std::string token_;
  int32_t rank_;
  std::vector<Segment> controls_, data_, grown_;
  std::vector<File> processes_;  // of the peers
  std::vector<bool> gone_;       // ended before they could be watched
};

}  // namespace

std::unique_ptr<Fabric> make_shm_fabric(const std::string& token, int32_t rank, int32_t world,
                                        double timeout_seconds) {
  return std::make_unique<ShmFabric>(token, rank, world, timeout_seconds);
}

}  // namespace flashmoe::fabric
