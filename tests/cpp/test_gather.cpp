// What ranks agree on outside of launches: messages to all, and files from process to process.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "base/error.h"
#include "fabric/descriptors.h"
#include "fabric/group.h"
#include "support.h"

namespace flashmoe::test {
namespace {

using fabric::Group;
using fabric::Message;

std::string new_token(const char* what) {
  static int serial = 0;
  return "gather-" + std::to_string(getpid()) + "-" + what + std::to_string(serial++);
}

std::unique_ptr<Group> shm_rank(const std::string& token, int32_t rank, int32_t world,
                                double timeout_seconds) {
  auto group = std::make_unique<Group>(fabric::make_shm_fabric(token, rank, world, 10.0), rank,
                                       world, fabric::GroupOptions{timeout_seconds});
  group->connect(group->waiter());
  return group;
}

using Groups = std::vector<std::unique_ptr<Group>>;

Groups thread_groups(int32_t world, double timeout_seconds = 10) {
  auto fabrics = fabric::make_thread_fabrics(world);
  Groups groups;
  for (int32_t rank = 0; rank < world; ++rank) {
    groups.push_back(std::make_unique<Group>(std::move(fabrics[static_cast<size_t>(rank)]), rank,
                                             world, fabric::GroupOptions{timeout_seconds}));
  }
  return groups;
}

Groups shm_groups(int32_t world, double timeout_seconds = 10) {
  const std::string token = new_token("shm");
  Groups groups(static_cast<size_t>(world));
  on_ranks(world, [&](int32_t rank) {
    groups[static_cast<size_t>(rank)] = shm_rank(token, rank, world, timeout_seconds);
  });
  return groups;
}

// A message that no other rank and no other round has.
Message message_of(int32_t rank, int round) {
  Rng rng(static_cast<uint64_t>(1000 * round + rank));
  Message message;
  for (auto& byte : message) byte = static_cast<std::byte>(rng.bits());
  return message;
}

void expect_gathers(const Groups& groups, int num_rounds) {
  const auto world = static_cast<int32_t>(groups.size());
  on_ranks(world, [&](int32_t rank) {
    Group& group = *groups[static_cast<size_t>(rank)];
    Rng rng(static_cast<uint64_t>(rank));
    for (int round = 0; round < num_rounds; ++round) {
      if (rng.chance(0.1)) std::this_thread::sleep_for(std::chrono::microseconds(200));
      const auto all = group.gather(message_of(rank, round), group.waiter());
      ASSERT_EQ(all.size(), groups.size());
      for (int32_t peer = 0; peer < world; ++peer) {
        ASSERT_EQ(all[static_cast<size_t>(peer)], message_of(peer, round))
            << "of rank " << peer << " at rank " << rank << ", round " << round;
      }
    }
  });
}

Outcome outcome_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.status(), error.what()};
  }
  return {};
}

TEST(Gather, EveryRankGetsEveryMessage) {
  for (const int32_t world : {1, 2, 3, 8}) {
    expect_gathers(thread_groups(world), rounds(400));
    expect_gathers(shm_groups(world), rounds(400));
  }
}

TEST(Gather, ARankThatStaysAwayIsNamedAndTheGroupStopped) {
  for (const bool processes : {false, true}) {
    const Groups groups = processes ? shm_groups(3, 0.2) : thread_groups(3, 0.2);
    on_ranks(3, [&](int32_t rank) {
      if (rank == 1) return;
      Group& group = *groups[static_cast<size_t>(rank)];
      const Outcome result = outcome_of([&] { group.gather({}, group.waiter()); });
      EXPECT_TRUE(result.status == FM_TIMEOUT || result.status == FM_ABORTED) << result.text;
      EXPECT_NE(result.text.find("rank 1"), std::string::npos) << result.text;
      EXPECT_NE(result.text.find("gather"), std::string::npos) << result.text;
    });
    expect_error(outcome_of([&] { groups[1]->gather({}, groups[1]->waiter()); }), FM_ABORTED,
                 {"rank 1"});
  }
}

TEST(Gather, AnAbortEndsItAndRunsTheHook) {
  const Groups groups = thread_groups(2);
  std::atomic<int> hooks{0};
  groups[1]->on_abort([&] { ++hooks; });
  on_ranks(2, [&](int32_t rank) {
    if (rank == 0) {
      const Outcome result = outcome_of([&] { groups[0]->gather({}, groups[0]->waiter()); });
      expect_error(result, FM_ABORTED, {"enough"});
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    groups[1]->abort(FM_ABORTED, "enough");
  });
  EXPECT_EQ(hooks, 1);
}

// A file without a name whose one byte says whose it is.
File marked_file(int32_t rank) {
  File file(memfd_create("flashmoe-test", MFD_CLOEXEC));
  const char mark = static_cast<char>('a' + rank);
  EXPECT_EQ(pwrite(file.get(), &mark, 1, 0), 1);
  return file;
}

char mark_of(const File& file) {
  char mark = 0;
  return pread(file.get(), &mark, 1, 0) == 1 ? mark : '?';
}

std::vector<File> exchange(Group& group, const File& own) {
  return fabric::exchange_descriptors(group, own, group.waiter(), group.options().timeout_seconds);
}

// What a rank finds in the files of the others: "abc" with '.' in its own place.
std::string exchanged_marks(Group& group) {
  std::string marks;
  for (const File& file : exchange(group, marked_file(group.rank()))) {
    marks += file.is_open() ? mark_of(file) : '.';
  }
  return marks;
}

TEST(Descriptors, EveryRankGetsTheFilesOfTheOthers) {
  for (const bool processes : {false, true}) {
    const Groups groups = processes ? shm_groups(4) : thread_groups(4);
    for (int round = 0; round < rounds(20); ++round) {
      on_ranks(4, [&](int32_t rank) {
        std::string expected = "abcd";
        expected[static_cast<size_t>(rank)] = '.';
        EXPECT_EQ(exchanged_marks(*groups[static_cast<size_t>(rank)]), expected);
      });
    }
  }
}

int num_open_files() {
  int count = 0;
  for (int descriptor = 0; descriptor < 512; ++descriptor) {
    count += fcntl(descriptor, F_GETFD) >= 0;
  }
  return count;
}

TEST(Descriptors, NothingStaysOpen) {
  const Groups groups = thread_groups(3);
  const int before = num_open_files();
  for (int round = 0; round < 5; ++round) {
    on_ranks(3, [&](int32_t rank) { exchanged_marks(*groups[static_cast<size_t>(rank)]); });
  }
  EXPECT_EQ(num_open_files(), before);
}

// Comes to the meeting as exchange_descriptors() does, with a socket that takes the peers' files,
// and sends none. The socket lasts as long as what is returned.
File meet_without_sending(Group& group) {
  const std::string name = "00112233445566778899aabbccddee" + std::to_string(10 + group.rank());
  File listener(socket(AF_UNIX, SOCK_SEQPACKET, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "flashmoe-" + name;
  std::memcpy(address.sun_path + 1, path.data(), path.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  EXPECT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length), 0);
  EXPECT_EQ(listen(listener.get(), 8), 0);
  Message message{};
  std::memcpy(message.data(), name.data(), name.size());
  group.gather(message, group.waiter());
  return listener;
}

TEST(Descriptors, AnAbortEndsTheWait) {
  const Groups groups = thread_groups(2);
  on_ranks(2, [&](int32_t rank) {
    if (rank == 0) {
      const File own = marked_file(0);
      expect_error(outcome_of([&] { exchange(*groups[0], own); }), FM_ABORTED, {"no memory here"});
      return;
    }
    const File listener = meet_without_sending(*groups[1]);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    groups[1]->abort(FM_OUT_OF_MEMORY, "no memory here");
  });
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork
// Runs `body` as rank 1 in a process of its own; 0 is what it returns when all is well.
pid_t fork_rank(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  return child;
}

TEST(Descriptors, ProcessesShareWhatHasNoName) {
  const std::string token = new_token("processes");
  const pid_t child = fork_rank([&] {
    const auto group = shm_rank(token, 1, 2, 10);
    return exchanged_marks(*group) == "a." ? 0 : 1;
  });
  const auto group = shm_rank(token, 0, 2, 10);
  const File own = marked_file(0);
  const auto files = exchange(*group, own);
  EXPECT_EQ(mark_of(files[1]), 'b');
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(mark_of(files[1]), 'b');  // its process has ended
}

TEST(Descriptors, ARankWithoutASocketIsNamed) {
  const Groups groups = thread_groups(2);
  on_ranks(2, [&](int32_t rank) {
    if (rank == 1) {
      // Rank 0 may have aborted the group before this rank has left.
      outcome_of([&] { groups[1]->gather({}, groups[1]->waiter()); });
      return;
    }
    const File own = marked_file(0);
    expect_error(outcome_of([&] { exchange(*groups[0], own); }), FM_UNSUPPORTED,
                 {"cannot reach the socket of rank 1", "network namespace"});
  });
}

TEST(Descriptors, AProcessThatDiesIsNamedAtOnce) {
  const std::string token = new_token("dies");
  const pid_t child = fork_rank([&] {
    const auto group = shm_rank(token, 1, 2, 10);
    const File listener = meet_without_sending(*group);
    usleep(200000);
    return 0;
  });
  const auto group = shm_rank(token, 0, 2, 30);
  const File own = marked_file(0);
  const auto start = std::chrono::steady_clock::now();
  const Outcome result = outcome_of([&] { exchange(*group, own); });
  waitpid(child, nullptr, 0);
  expect_error(result, FM_TIMEOUT, {"rank 1 is gone", "its process has ended", "handle"});
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
  EXPECT_LT(waited.count(), kSanitized ? 15 : 2);
}
#endif

}  // namespace
}  // namespace flashmoe::test
