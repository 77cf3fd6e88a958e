// What all C++ tests share: seeded randomness, sizes that shrink under a sanitizer, threads as
// ranks, and the status of a call with its text.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "flashmoe/c_api.h"

namespace flashmoe::test {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// Rounds of a random test: a sanitized program is ten to thirty times slower.
constexpr int rounds(int release) { return kSanitized ? std::max(2, release / 4) : release; }

// splitmix64: the same numbers on every machine, which <random>'s distributions do not promise.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // First and last included.
  int64_t between(int64_t first, int64_t last) {
    return first + static_cast<int64_t>(bits() % static_cast<uint64_t>(last - first + 1));
  }
  int32_t between32(int32_t first, int32_t last) {
    return static_cast<int32_t>(between(first, last));
  }
  double uniform(double low = 0.0, double high = 1.0) {
    return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53;
  }
  bool chance(double probability) { return uniform() < probability; }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  template <class T>
  std::vector<T> vector(size_t size, double low = -1.0, double high = 1.0) {
    std::vector<T> values(size);
    for (T& value : values) value = static_cast<T>(uniform(low, high));
    return values;
  }

 private:
  uint64_t state_;
};

// Calls body(rng) for seeds 0..count-1 and stops at the first that fails, naming it.
template <class Body>
void for_seeds(int count, Body&& body) {
  for (int seed = 0; seed < count; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(static_cast<uint64_t>(seed));
    body(rng);
    if (testing::Test::HasFailure()) return;
  }
}

// Errors of the engine beside those of a plain implementation of the same precision, over the cases
// of a test. The engine's are to be at most 1.25 times as large: root mean square of the ratio,
// every case with the weight of its elements, so that one wrong case shows and a tensor of two
// elements does not roll dice. What the exact result may lose by its own rounding counts as an
// error that any implementation has.
class Yardstick {
 public:
  // epsilon: of the dtype that the results are stored in.
  explicit Yardstick(double epsilon) : unit_roundoff_(epsilon / 2) {}

  // One result: what was got, what a plain implementation gets, what is right.
  template <class Exact>
  void add(const std::string& name, const std::vector<double>& got,
           const std::vector<double>& plain, const std::vector<Exact>& exact) {
    ASSERT_EQ(got.size(), exact.size()) << name;
    ASSERT_EQ(plain.size(), exact.size()) << name;
    double error = 0, plain_error = 0, norm = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      error += square(static_cast<double>(got[i] - exact[i]));
      plain_error += square(static_cast<double>(plain[i] - exact[i]));
      norm += square(static_cast<double>(exact[i]));
    }
    ASSERT_TRUE(std::isfinite(error)) << name;
    const double allowed = std::max(plain_error, square(unit_roundoff_) * norm);
    if (allowed == 0) {
      EXPECT_EQ(error, 0.0) << name;
      return;
    }
    Sum& sum = sums_[name];
    const auto weight = static_cast<double>(exact.size());
    sum.squares += weight * error / allowed;
    sum.elements += weight;
    sum.worst = std::max(sum.worst, std::sqrt(error / allowed));
  }
  void check() const {
    for (const auto& [name, sum] : sums_) {
      // n elements measure the ratio of two root mean squares to about 1 / sqrt(n).
      const double allowed = 1.25 * (1 + 4 / std::sqrt(sum.elements));
      EXPECT_LE(std::sqrt(sum.squares / sum.elements), allowed)
          << name << ": error over the plain implementation's; worst case " << sum.worst;
    }
  }

 private:
  struct Sum {
    double squares = 0, elements = 0, worst = 0;
  };
  static double square(double value) { return value * value; }

  double unit_roundoff_;
  std::map<std::string, Sum> sums_;
};

// What a call of the C ABI returned, with the text that its thread had then.
struct Outcome {
  fm_status status = FM_OK;
  std::string text;
};

inline Outcome outcome(fm_status status) {
  return {status, status == FM_OK ? std::string() : fm_last_error()};
}

inline void expect_ok(const Outcome& result) { EXPECT_EQ(result.status, FM_OK) << result.text; }
inline void expect_all_ok(const std::vector<Outcome>& results) {
  for (const Outcome& result : results) expect_ok(result);
}

// The call failed with `status` and its text holds every word.
inline void expect_error(const Outcome& result, fm_status status,
                         std::initializer_list<const char*> words) {
  EXPECT_EQ(result.status, status) << result.text;
  for (const char* word : words) {
    EXPECT_NE(result.text.find(word), std::string::npos) << "'" << word << "' in: " << result.text;
  }
}

// Runs body(rank) on one thread a rank.
inline void on_ranks(int32_t world, const std::function<void(int32_t)>& body) {
  std::vector<std::thread> threads;
  for (int32_t rank = 1; rank < world; ++rank) threads.emplace_back(body, rank);
  body(0);
  for (auto& thread : threads) thread.join();
}

// The handles of a group, destroyed together.
class Ranks {
 public:
  explicit Ranks(int32_t world) : groups_(static_cast<size_t>(world)) {
    expect_ok(outcome(fm_group_create_local(world, groups_.data())));
  }
  // Processes' shared memory, joined by threads of this process.
  Ranks(int32_t world, const std::string& token) : groups_(static_cast<size_t>(world)) {
    on_ranks(world, [&](int32_t rank) {
      expect_ok(outcome(
          fm_group_create_shm(token.c_str(), rank, world, &groups_[static_cast<size_t>(rank)])));
    });
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks() {
    for (fm_group group : groups_) fm_group_destroy(group);
  }

  int32_t world() const { return static_cast<int32_t>(groups_.size()); }
  fm_group operator[](int32_t rank) const { return groups_[static_cast<size_t>(rank)]; }
  void set(const char* key, double value) const {
    for (fm_group group : groups_) expect_ok(outcome(fm_group_set(group, key, value)));
  }
  fm_stats stats(int32_t rank) const {
    fm_stats stats{};
    stats.struct_size = sizeof(stats);
    expect_ok(outcome(fm_group_stats((*this)[rank], &stats)));
    return stats;
  }

 private:
  std::vector<fm_group> groups_;
};

}  // namespace flashmoe::test
