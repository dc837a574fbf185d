// Threads that the system stops in the midst of a tile: at random, and where it must be noticed.
// To be included before the kernels.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace test {

// One tile in 64 takes a fifth of a millisecond longer: more than anybody waits for.
inline void stall(int thread) {
  thread_local uint32_t state = 1;
  state = state * 1664525u + 1013904223u + uint32_t(thread);
  if (state >> 26 == 0) usleep(200);
}

}  // namespace test

#define HW_STALL(thread) test::stall(thread)
