#include "base/env.h"

#include <cstdlib>
#include <string>

#include "base/error.h"

namespace flashmoe {
namespace {

double read_number(const char* name, double fallback) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return fallback;
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  if (*end != '\0' || !(value >= 0 && value <= 1e9)) {
    fail(FM_INVALID_VALUE, name, " is '", text, "', expected a number of 0..1e9");
  }
  return value;
}

}  // namespace

double env_timeout_seconds() { return read_number("FLASHMOE_TIMEOUT_S", 60.0); }

int env_num_threads() { return static_cast<int>(read_number("FLASHMOE_NUM_THREADS", 0.0)); }

int env_local_world_size() {
  for (const char* name :
       {"LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"}) {
    const double value = read_number(name, 0.0);
    if (value >= 1) return static_cast<int>(value);
  }
  return 1;
}

}  // namespace flashmoe
