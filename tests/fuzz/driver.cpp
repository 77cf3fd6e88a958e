// Runs a fuzzer where the compiler has none of its own (g++): random inputs from numbered seeds,
// under the sanitizers that it was built with. An input that fails is named by its seed.
//
//   fuzz_c_api --seconds 20 [--seed FIRST]     random inputs
//   fuzz_c_api FILE ...                        the inputs in these files
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" void fuzz_report();
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

constexpr size_t kLongest = 4096;

uint64_t current_seed = 0;

void name_seed() {
  std::fprintf(stderr, "fuzz: repeat with --seed %lu --seconds 0\n", current_seed);
}

// splitmix64
uint64_t next(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::vector<uint8_t> random_input(uint64_t seed) {
  uint64_t state = seed;
  std::vector<uint8_t> bytes(next(state) % kLongest);
  for (auto& byte : bytes) byte = static_cast<uint8_t>(next(state));
  return bytes;
}

int run_files(int count, char** names) {
  for (int i = 0; i < count; ++i) {
    std::ifstream file(names[i], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("%d files\n", count);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 20;
  uint64_t first = 1;
  int at = 1;
  for (; at + 1 < argc && std::strncmp(argv[at], "--", 2) == 0; at += 2) {
    if (std::strcmp(argv[at], "--seconds") == 0) seconds = std::atof(argv[at + 1]);
    if (std::strcmp(argv[at], "--seed") == 0) first = std::strtoull(argv[at + 1], nullptr, 10);
  }
  if (at < argc) return run_files(argc - at, argv + at);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(name_seed);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  uint64_t count = 0;
  do {
    current_seed = first + count++;
    const auto input = random_input(current_seed);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  fuzz_report();
  std::printf("%lu inputs, seeds %lu to %lu\n", count, first, current_seed);
  return 0;
}
