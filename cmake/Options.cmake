# flashmoe_options: how our own code is compiled.
find_package(Threads REQUIRED)
add_library(flashmoe_options INTERFACE)

set(cxx $<COMPILE_LANGUAGE:C,CXX>)
target_compile_options(flashmoe_options INTERFACE $<${cxx}:-Wall;-Wextra>)
# g++ 12 takes its own AVX-512 intrinsics for uninitialised reads (GCC bug 105593).
target_compile_options(flashmoe_options INTERFACE $<${cxx}:-Wno-maybe-uninitialized>)
if(FLASHMOE_WERROR)
  target_compile_options(flashmoe_options INTERFACE $<${cxx}:-Werror>)
endif()
# Nobody reads errno or the floating-point flags after a loop: lets the compiler vectorise it.
target_compile_options(flashmoe_options INTERFACE $<${cxx}:-fno-math-errno;-fno-trapping-math>)
if(FLASHMOE_NATIVE)
  # For every target alike: Eigen's alignment, and so its types, follow the instruction set.
  target_compile_options(flashmoe_options INTERFACE $<${cxx}:-march=native>)
endif()

if(FLASHMOE_SANITIZE STREQUAL "thread")
  set(sanitizer -fsanitize=thread)
elseif(FLASHMOE_SANITIZE STREQUAL "address")
  set(sanitizer -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(FLASHMOE_SANITIZE)
  message(FATAL_ERROR "FLASHMOE_SANITIZE=${FLASHMOE_SANITIZE}: accepted are thread and address")
endif()
if(FLASHMOE_SANITIZE)
  # -O1: readable reports, and instrumented templates compile in reasonable time.
  target_compile_options(flashmoe_options INTERFACE ${sanitizer} -O1 -g1 -fno-omit-frame-pointer)
  target_link_options(flashmoe_options INTERFACE ${sanitizer})
endif()
