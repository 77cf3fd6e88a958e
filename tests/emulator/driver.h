// The CUDA driver's functions that the library asks the runtime for.
#pragma once

#include <string_view>

namespace flashmoe::emulator {

// Null for a function that is not emulated.
void* find_driver_function(std::string_view name);

}  // namespace flashmoe::emulator
