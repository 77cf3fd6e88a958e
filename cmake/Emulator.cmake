# Decides whether the CUDA kernels are also built for the CPU, where tests run them
# (FLASHMOE_HAVE_EMULATOR): that takes the headers of a CUDA toolkit, and no CUDA compiler.
set(FLASHMOE_HAVE_EMULATOR OFF)
if(FLASHMOE_TESTS)
  find_path(FLASHMOE_CUDA_INCLUDE cuda_runtime_api.h
            HINTS ${CUDAToolkit_INCLUDE_DIRS} ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
            PATH_SUFFIXES include)
  # From CUDA 13 on the C++ library of the toolkit has a folder of its own.
  find_path(FLASHMOE_CUDA_CXX_INCLUDE cuda/ptx
            HINTS "${FLASHMOE_CUDA_INCLUDE}/cccl" "${FLASHMOE_CUDA_INCLUDE}")
  if(FLASHMOE_CUDA_INCLUDE AND FLASHMOE_CUDA_CXX_INCLUDE)
    set(FLASHMOE_HAVE_EMULATOR ON)
    set(FLASHMOE_CUDA_HEADERS "${FLASHMOE_CUDA_INCLUDE}" "${FLASHMOE_CUDA_CXX_INCLUDE}")
  endif()
endif()
