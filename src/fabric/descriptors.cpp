#include "fabric/descriptors.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

namespace flashmoe::fabric {
namespace {

constexpr int kNameBytes = 32;
constexpr int kPollMilliseconds = 20;
constexpr suseconds_t kReceiveMicroseconds = 100000;

std::string random_name() {
  unsigned char bits[kNameBytes / 2];
  if (getrandom(bits, sizeof(bits), 0) != static_cast<ssize_t>(sizeof(bits))) {
    fail(FM_INTERNAL, "getrandom: ", std::strerror(errno));
  }
  constexpr char kDigits[] = "0123456789abcdef";
  std::string name;
  for (const unsigned char byte : bits) {
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name;
}

// An address in the abstract namespace: it ends with the last socket that has it.
struct Address {
  explicit Address(const std::string& name) {
    const std::string text = "flashmoe-" + name;
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, text.data(), text.size());
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }

  sockaddr_un address{};
  socklen_t length;
};

File new_socket() {
  File made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!made.is_open()) fail(FM_INTERNAL, "a Unix socket: ", std::strerror(errno));
  return made;
}

File listen_as(const std::string& name) {
  File made = new_socket();
  const Address address(name);
  if (bind(made.get(), address.get(), address.length) != 0 ||
      listen(made.get(), plan::kMaxWorld) != 0) {
    fail(FM_INTERNAL, "a listening Unix socket: ", std::strerror(errno));
  }
  return made;
}

// One packet: the sender's rank, and its file beside it.
struct Packet {
  explicit Packet(int32_t& rank) : part{.iov_base = &rank, .iov_len = sizeof(rank)} {
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = room;
    message.msg_controllen = sizeof(room);
  }
  iovec part;
  msghdr message{};
  alignas(cmsghdr) char room[CMSG_SPACE(sizeof(int))]{};
};

void send_to(const std::string& name, int32_t peer, int32_t rank, const File& file) {
  const File connection = new_socket();
  const Address address(name);
  int status = 0;
  do {
    status = connect(connection.get(), address.get(), address.length);
  } while (status != 0 && errno == EINTR);
  if (status != 0) {
    fail(FM_UNSUPPORTED, "rank ", rank, " cannot reach the socket of rank ", peer, ": ",
         std::strerror(errno),
         "; ranks on CUDA share a network namespace (containers: the same one, or --network=host)");
  }
  Packet packet(rank);
  cmsghdr* header = CMSG_FIRSTHDR(&packet.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int descriptor = file.get();
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof(descriptor));
  if (sendmsg(connection.get(), &packet.message, MSG_NOSIGNAL) < 0) {
    fail(FM_INTERNAL, "rank ", rank, " cannot send a file to rank ", peer, ": ",
         std::strerror(errno));
  }
}

// Whether the other end is a process of this user: the names of abstract sockets are no secret.
bool is_of_this_user(const File& connection) {
  ucred other{};
  socklen_t size = sizeof(other);
  return getsockopt(connection.get(), SOL_SOCKET, SO_PEERCRED, &other, &size) == 0 &&
         other.uid == geteuid();
}

// The file that waits in a connection, and whose it is; a closed one if there is none.
File receive_from(const File& connection, int32_t& sender) {
  Packet packet(sender);
  ssize_t got = 0;
  do {
    got = recvmsg(connection.get(), &packet.message, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  const cmsghdr* header = CMSG_FIRSTHDR(&packet.message);
  if (got != static_cast<ssize_t>(sizeof(sender)) || header == nullptr ||
      header->cmsg_type != SCM_RIGHTS || header->cmsg_len != CMSG_LEN(sizeof(int))) {
    return {};
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(descriptor));
  return File(descriptor);
}

int32_t first_missing(const std::vector<File>& files, int32_t rank) {
  for (int32_t peer = 0; peer < static_cast<int32_t>(files.size()); ++peer) {
    if (peer != rank && !files[static_cast<size_t>(peer)].is_open()) return peer;
  }
  return -1;
}

// Takes one connection, if one comes soon.
void accept_one(const File& listener, int32_t rank, std::vector<File>& files) {
  pollfd ready{.fd = listener.get(), .events = POLLIN, .revents = 0};
  if (poll(&ready, 1, kPollMilliseconds) <= 0) return;
  const File connection(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!connection.is_open() || !is_of_this_user(connection)) return;
  // Who connects and then says nothing holds up no one.
  const timeval patience{.tv_sec = 0, .tv_usec = kReceiveMicroseconds};
  setsockopt(connection.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  int32_t sender = -1;
  File file = receive_from(connection, sender);
  if (!file.is_open() || sender < 0 || sender >= static_cast<int32_t>(files.size())) return;
  if (sender != rank) files[static_cast<size_t>(sender)] = std::move(file);
}

std::vector<File> receive_all(const Group& group, const File& listener, const Waiter& waiter,
                              double timeout_seconds) {
  std::vector<File> files(static_cast<size_t>(group.world()));
  const int32_t rank = group.rank();
  Backoff backoff{std::chrono::microseconds(0)};
  bool gone = false;  // the peer; what it sent before it went is still in its connection
  for (int32_t peer = 0; (peer = first_missing(files, rank)) >= 0; backoff.pause()) {
    accept_one(listener, rank, files);
    if (files[static_cast<size_t>(peer)].is_open()) {
      gone = false;
      continue;
    }
    waiter.check_abort();
    if (gone) {
      fail(FM_TIMEOUT, "rank ", peer, " is gone: its process has ended. Rank ", rank,
           " waited for the handle of its memory");
    }
    gone = !group.fabric().is_alive(peer);
    if (timeout_seconds <= 0 || backoff.seconds() < timeout_seconds) continue;
    fail(FM_TIMEOUT, "rank ", rank, " waited ", timeout_seconds,
         " s for the handle of the memory of rank ", peer,
         ". Is that rank alive and in the same call? FLASHMOE_TIMEOUT_S sets the bound");
  }
  return files;
}

}  // namespace

std::vector<File> exchange_descriptors(Group& group, const File& own, const Waiter& waiter,
                                       double timeout_seconds) {
  try {
    const std::string name = random_name();
    const File listener = listen_as(name);
    Message message{};
    std::memcpy(message.data(), name.data(), name.size());
    const std::vector<Message> names = group.gather(message, waiter);
    for (int32_t peer = 0; peer < group.world(); ++peer) {
      if (peer == group.rank()) continue;
      const auto* text = reinterpret_cast<const char*>(names[static_cast<size_t>(peer)].data());
      send_to(std::string(text, kNameBytes), peer, group.rank(), own);
    }
    return receive_all(group, listener, waiter, timeout_seconds);
  } catch (const Error& error) {
    if (error.status() != FM_ABORTED) group.abort(error.status(), error.what());
    throw;
  }
}

}  // namespace flashmoe::fabric
