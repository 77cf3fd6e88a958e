# Decides whether the CUDA part is built (FLASHMOE_HAVE_CUDA) and enables the language for it.
set(FLASHMOE_MIN_CUDA 12.4)
set(FLASHMOE_HAVE_CUDA OFF)
if(FLASHMOE_CUDA)
  find_program(FLASHMOE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(FLASHMOE_NVCC)
    # Hopper with its own instructions (wgmma, TMA): SASS of sm_90a runs on no other architecture.
    set(CMAKE_CUDA_ARCHITECTURES 90a-real CACHE STRING "CUDA architectures")
    set(CMAKE_CUDA_COMPILER "${FLASHMOE_NVCC}" CACHE FILEPATH "CUDA compiler")
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    if(CMAKE_VERSION VERSION_LESS 3.26) # does not know yet that nvcc speaks C++20
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
    find_package(CUDAToolkit REQUIRED)
    if(NOT CMAKE_CUDA_COMPILER_VERSION VERSION_LESS FLASHMOE_MIN_CUDA)
      set(FLASHMOE_HAVE_CUDA ON)
    elseif(FLASHMOE_CUDA STREQUAL "AUTO")
      message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is older than ${FLASHMOE_MIN_CUDA}: "
                     "built without")
    else()
      message(FATAL_ERROR "CUDA ${CMAKE_CUDA_COMPILER_VERSION} at ${FLASHMOE_NVCC}: "
                          "${FLASHMOE_MIN_CUDA} or newer is needed")
    endif()
  elseif(NOT FLASHMOE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FLASHMOE_CUDA=${FLASHMOE_CUDA}, but no nvcc: set CUDA_HOME or "
                        "FLASHMOE_NVCC, or FLASHMOE_CUDA=OFF")
  endif()
endif()
