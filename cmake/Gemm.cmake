# flashmoe_gemm: the libraries of the CPU matrix products. Eigen always (fp64, and all dtypes where
# oneDNN is not used); oneDNN for fp32 and bf16. Sources see FLASHMOE_ONEDNN as 1 or 0.
add_library(flashmoe_gemm INTERFACE)

find_path(EIGEN_INCLUDE_DIR Eigen/Core PATH_SUFFIXES eigen3 include/eigen3)
if(NOT EIGEN_INCLUDE_DIR)
  message(FATAL_ERROR "Eigen 3.4 is missing: apt-get install libeigen3-dev, "
                      "or set EIGEN_INCLUDE_DIR to the folder that holds Eigen/Core")
endif()
target_include_directories(flashmoe_gemm SYSTEM INTERFACE "${EIGEN_INCLUDE_DIR}")
# The engine spreads tasks over threads: a product inside a task takes one.
target_compile_definitions(flashmoe_gemm INTERFACE EIGEN_DONT_PARALLELIZE EIGEN_MPL2_ONLY)

if(NOT FLASHMOE_GEMM MATCHES "^(auto|onednn|eigen)$")
  message(FATAL_ERROR "FLASHMOE_GEMM=${FLASHMOE_GEMM}: accepted are auto, onednn and eigen")
endif()
set(onednn_found OFF)
if(NOT FLASHMOE_GEMM STREQUAL "eigen")
  # By header and library: the CMake package of some distributions asks for OpenCL.
  find_path(ONEDNN_INCLUDE_DIR oneapi/dnnl/dnnl.hpp)
  find_library(ONEDNN_LIBRARY dnnl)
  find_package(OpenMP COMPONENTS CXX)
  if(ONEDNN_INCLUDE_DIR AND ONEDNN_LIBRARY AND OpenMP_CXX_FOUND)
    set(onednn_found ON)
  elseif(FLASHMOE_GEMM STREQUAL "onednn")
    message(FATAL_ERROR "oneDNN is missing: apt-get install libdnnl-dev, "
                        "or set ONEDNN_INCLUDE_DIR and ONEDNN_LIBRARY, or FLASHMOE_GEMM=eigen")
  endif()
endif()

if(onednn_found)
  set(FLASHMOE_GEMM_NAME onednn)
  target_include_directories(flashmoe_gemm SYSTEM INTERFACE "${ONEDNN_INCLUDE_DIR}")
  target_compile_definitions(flashmoe_gemm INTERFACE FLASHMOE_ONEDNN=1)
  # oneDNN runs on OpenMP: each engine thread sets its own team to one.
  target_link_libraries(flashmoe_gemm INTERFACE "${ONEDNN_LIBRARY}" OpenMP::OpenMP_CXX)
else()
  set(FLASHMOE_GEMM_NAME eigen)
  target_compile_definitions(flashmoe_gemm INTERFACE FLASHMOE_ONEDNN=0)
endif()
