# `cmake --install`: libflashmoe.so, its headers and a CMake package, for C and C++ programs.
# A wheel takes the component "python" alone (src/bindings).
include(CMakePackageConfigHelpers)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/flashmoe")
install(TARGETS flashmoe EXPORT flashmoeTargets COMPONENT library
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/flashmoe" COMPONENT library
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT flashmoeTargets NAMESPACE flashmoe:: DESTINATION "${package_dir}" COMPONENT library)
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/flashmoeConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/flashmoeConfig.cmake"
                              INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/flashmoeConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/flashmoeConfig.cmake"
              "${PROJECT_BINARY_DIR}/flashmoeConfigVersion.cmake"
        DESTINATION "${package_dir}" COMPONENT library)
