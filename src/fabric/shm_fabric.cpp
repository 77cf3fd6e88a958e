// Ranks as processes of one machine over POSIX shared memory.
//
// Every segment lives under a name only while its peers open it: "/flashmoe-<token>-<rank>" for the
// control block and "....g<generation>" for a data part. Once all ranks have mapped it the owner
// unlinks it, so that whatever happens to the processes later, nothing stays behind.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "fabric/fabric.h"

namespace flashmoe::fabric {
namespace {

// A mapped segment; the creator also owns the name until drop_name().
class Segment {
 public:
  Segment() = default;
  Segment(Segment&& other) noexcept { *this = std::move(other); }
  Segment& operator=(Segment&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    std::swap(owns_name_, other.owns_name_);
    return *this;
  }
  ~Segment() {
    drop_name();
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }

  static Segment create(const std::string& name, size_t bytes) {
    const int file = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file < 0) {
      fail(errno == EEXIST ? FM_INVALID_VALUE : FM_OUT_OF_MEMORY, "shared memory ", name, ": ",
           std::strerror(errno), "; a group's token must be new, and /dev/shm writable");
    }
    Segment segment;
    segment.name_ = name;
    segment.owns_name_ = true;
    // posix_fallocate, not ftruncate: a full /dev/shm is an error here and not a SIGBUS later.
    int error = 0;
    do {
      error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
    } while (error == EINTR);
    if (error == 0) segment.map(file, bytes);
    close(file);
    if (error != 0 || segment.memory_ == nullptr) {
      fail(FM_OUT_OF_MEMORY, "shared memory ", name, ": no room for ", bytes,
           " bytes; enlarge /dev/shm or use fewer tokens");
    }
    return segment;
  }

  // Null memory when the name does not exist (yet) or is not complete.
  static Segment open(const std::string& name, size_t bytes) {
    Segment segment;
    const int file = shm_open(name.c_str(), O_RDWR, 0600);
    if (file < 0) return segment;
    struct stat info {};
    if (fstat(file, &info) == 0 && static_cast<size_t>(info.st_size) >= bytes) {
      segment.name_ = name;
      segment.map(file, bytes);
    }
    close(file);
    return segment;
  }

  void drop_name() {
    if (owns_name_) shm_unlink(name_.c_str());
    owns_name_ = false;
  }
  std::byte* memory() const { return static_cast<std::byte*>(memory_); }

 private:
  void map(int file, size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return;
    memory_ = memory;
    bytes_ = bytes;
  }

  std::string name_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
  bool owns_name_ = false;
};

class ShmFabric final : public Fabric {
 public:
  ShmFabric(std::string token, int32_t rank, int32_t world, double timeout_seconds)
      : token_(std::move(token)), rank_(rank), controls_(world), data_(world), grown_(world) {
    controls_[rank] = Segment::create(name_of(rank), sizeof(ControlBlock));
    auto* own = new (controls_[rank].memory()) ControlBlock();
    own->world = world;
    set_build(*own);
    own->hello.store(kControlMagic, std::memory_order_release);
    const auto start = std::chrono::steady_clock::now();
    for (int32_t peer = 0; peer < world; ++peer) {
      if (peer != rank) open_peer(peer, start, timeout_seconds);
    }
  }

  const char* name() const override { return "shm"; }
  ControlBlock* control(int32_t rank) const override {
    return reinterpret_cast<ControlBlock*>(controls_[rank].memory());
  }
  std::byte* data(int32_t rank) const override { return data_[rank].memory(); }

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
  std::string name_of(int32_t rank) const {
    return "/flashmoe-" + token_ + "-" + std::to_string(rank);
  }
  std::string name_of(int32_t rank, uint32_t generation) const {
    return name_of(rank) + ".g" + std::to_string(generation);
  }

  void open_peer(int32_t peer, std::chrono::steady_clock::time_point start, double timeout) {
    while (true) {
      controls_[peer] = Segment::open(name_of(peer), sizeof(ControlBlock));
      if (controls_[peer].memory() != nullptr &&
          control(peer)->hello.load(std::memory_order_acquire) == kControlMagic) {
        return check_peer(peer);
      }
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (timeout > 0 && waited.count() > timeout) {
        fail(FM_TIMEOUT, "rank ", rank_, " waited ", timeout, " s for rank ", peer,
             " to join the group '", token_, "'. Do all ranks make it, with the same token?");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void check_peer(int32_t peer) const {
    const auto world = static_cast<int32_t>(controls_.size());
    if (control(peer)->world != world) {
      fail(FM_MISMATCH, "rank ", peer, " makes the group '", token_, "' of ", control(peer)->world,
           " ranks, rank ", rank_, " of ", world);
    }
    check_build(*control(peer), peer, *control(rank_), rank_);
  }

  std::string token_;
  int32_t rank_;
  std::vector<Segment> controls_, data_, grown_;
};

}  // namespace

std::unique_ptr<Fabric> make_shm_fabric(const std::string& token, int32_t rank, int32_t world,
                                        double timeout_seconds) {
  return std::make_unique<ShmFabric>(token, rank, world, timeout_seconds);
}

}  // namespace flashmoe::fabric
