# Horovod 0.28.1 asks CMake for C++14, and torch's headers need C++17 or later (2.13: C++20); Horovod's build has no
# option for it. CMake reads this toolchain file twice: when it starts, and again at the end of project(), where
# the flags that it derives from the asked standard can be replaced.
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_FILE}")
foreach(_standard 11 14 17)
  set(CMAKE_CXX${_standard}_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CXX${_standard}_EXTENSION_COMPILE_OPTION "-std=gnu++20")
endforeach()
