// Groups and processes: what a forked child may do with one, and ranks over shared memory.
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <string>

#include "base/error.h"
#include "fabric/fabric.h"
#include "group_common.h"

namespace flashmoe::test {
namespace {

// --- fork -----------------------------------------------------------------------------------

// What body() returns in a child process; -1 when it did not come to an end.
int in_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// The parent's threads are not there in the child, whatever they held.
TEST(Fork, AChildUsesAndClosesTheGroupOfARankAlone) {
  if (kSanitized) GTEST_SKIP() << "ThreadSanitizer ends a forked child that starts threads";
  Rng rng(1);
  LayerCase c(rng, small_layer(4, 2), {.world = 1, .tokens = {70}});
  fm_group group = nullptr;
  expect_ok(outcome(fm_group_create_self(&group)));
  expect_ok(outcome(fm_group_set(group, "num_threads", 3)));
  expect_ok(forward_alone(c, group));
  const auto expected = c.output_bytes();
  EXPECT_EQ(in_child([&] {
              c.poison_outputs();
              const bool good = forward_alone(c, group).status == FM_OK;
              fm_group_destroy(group);
              return good && c.output_bytes() == expected ? 0 : 1;
            }),
            0);
  EXPECT_EQ(in_child([&] {
              fm_group_destroy(group);
              return 0;
            }),
            0);
  expect_ok(forward_alone(c, group));
  fm_group_destroy(group);
}

TEST(Fork, AGroupOfSeveralRanksIsRefusedInAChild) {
  if (kSanitized) GTEST_SKIP() << "ThreadSanitizer ends a forked child that starts threads";
  Rng rng(1);
  LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
  const Ranks group(2);
  expect_all_ok(c.forward(group));
  EXPECT_EQ(in_child([&] {
              const Outcome refused = forward_alone(c, group[0]);
              const bool named = refused.text.find("forked") != std::string::npos;
              return refused.status == FM_UNSUPPORTED && named ? 0 : 1;
            }),
            0);
  expect_all_ok(c.forward(group));  // the parent's group is as it was
}

// --- shared memory --------------------------------------------------------------------------

std::vector<std::string> shared_names(const std::string& token) {
  std::vector<std::string> names;
  DIR* directory = opendir("/dev/shm");
  if (directory == nullptr) return names;
  while (const dirent* entry = readdir(directory)) {
    if (std::string(entry->d_name).find(token) != std::string::npos) {
      names.emplace_back(entry->d_name);
    }
  }
  closedir(directory);
  return names;
}

// True once the owner of the name holds its lock: until then the name looks like one left behind.
bool is_owned(const std::string& name) {
  const int file = open(("/dev/shm/" + name).c_str(), O_RDWR);
  const bool owned = file >= 0 && flock(file, LOCK_EX | LOCK_NB) != 0;
  if (file >= 0) close(file);
  return owned;
}

std::string new_token() {
  static std::atomic<int> count{0};
  return "test" + std::to_string(getpid()) + "-" + std::to_string(count++);
}

TEST(SharedMemory, GivesTheBitsOfThreads) {
  for (const int32_t world : {1, 2, 4}) {
    Rng rng(static_cast<uint64_t>(world));
    std::vector<int64_t> tokens{66, 0, 3, 130};
    tokens.resize(static_cast<size_t>(world));
    LayerCase c(rng, small_layer(2 * world, 2), {.world = world, .tokens = tokens});
    const auto run = [&](const Ranks& group) {
      c.poison_outputs();
      expect_all_ok(c.forward(group));
      expect_all_ok(c.backward(group));
      return c.output_bytes();
    };
    const auto expected = run(Ranks(world));
    const std::string token = new_token();
    const Ranks group(world, token);
    group.set("jitter_us", 100);
    for (int i = 0; i < rounds(20); ++i) ASSERT_EQ(run(group), expected) << world << " ranks";
  }
}

TEST(SharedMemory, NoNameIsLeftWhileItRunsOrAfter) {
  const std::string token = new_token();
  {
    const Ranks group(3, token);
    EXPECT_TRUE(shared_names(token).empty()) << shared_names(token)[0];
    Rng rng(1);
    run_checked(rng, group, small_layer(3, 1), {4, 5, 6}, true);
    EXPECT_TRUE(shared_names(token).empty()) << shared_names(token)[0];
    run_checked(rng, group, small_layer(3, 1), {400, 5, 6}, true);
    EXPECT_TRUE(shared_names(token).empty()) << shared_names(token)[0];
  }
  EXPECT_TRUE(shared_names(token).empty());
}

TEST(SharedMemory, AnAbsentRankEndsTheCreationAndLeavesNoName) {
  setenv("FLASHMOE_TIMEOUT_S", "0.05", 1);
  const std::string token = new_token();
  fm_group group = nullptr;
  expect_error(outcome(fm_group_create_shm(token.c_str(), 0, 2, &group)), FM_TIMEOUT,
               {"rank 0 waited 0.05 s", "rank 1", token.c_str()});
  unsetenv("FLASHMOE_TIMEOUT_S");
  EXPECT_TRUE(shared_names(token).empty());
}

TEST(SharedMemory, ATokenInUseIsRefused) {
  const std::string token = new_token();
  std::atomic<bool> refused{false};
  setenv("FLASHMOE_TIMEOUT_S", "20", 1);
  std::thread first([&] {
    fm_group group = nullptr;
    expect_ok(outcome(fm_group_create_shm(token.c_str(), 0, 2, &group)));
    fm_group_destroy(group);
  });
  while (!is_owned("flashmoe-" + token + "-0")) std::this_thread::yield();
  fm_group second = nullptr;
  expect_error(outcome(fm_group_create_shm(token.c_str(), 0, 2, &second)), FM_INVALID_VALUE,
               {"token must be new"});
  expect_ok(outcome(fm_group_create_shm(token.c_str(), 1, 2, &second)));
  fm_group_destroy(second);
  first.join();
  unsetenv("FLASHMOE_TIMEOUT_S");
}

}  // namespace
}  // namespace flashmoe::test
