// A thread is stopped in the midst of a tile: the others do it and go on, and what it brings when it
// is back is dropped.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "exact.hpp"
#include "threads.hpp"

namespace test {

inline void check_a_stopped_thread(int num_threads) {
  if (!hw::kTakesOver) return;
  constexpr int kTiles = 12, kPhases = 3;
  hw::Team team(num_threads);
  hw::Phases phases(num_threads);
  phases.reset(kPhases);
  std::atomic<int> stopped{-1};      // the thread that has a tile of the first phase and stands
  std::atomic<bool> going_on{false};  // another one is in the second phase
  std::vector<int> kept(kTiles * kPhases), results(size_t(num_threads), -1);
  std::atomic<int> computed{0}, wrong{0};
  team.run([&](int thread) {
    for (int phase = 0; phase < kPhases; ++phase) {
      const auto compute = [&, phase](int tile) {
        ++computed;
        if (phase == 0 && thread != 0) {
          int nobody = -1;
          if (stopped.compare_exchange_strong(nobody, thread))
            while (!going_on) std::this_thread::yield();
        } else if (phase == 0) {
          while (stopped < 0) std::this_thread::yield();
        } else if (thread != stopped) {
          going_on = true;
        }
        results[size_t(thread)] = phase * kTiles + tile;
      };
      const auto keep = [&, phase](int tile) {
        wrong += results[size_t(thread)] != phase * kTiles + tile;
        ++kept[size_t(phase * kTiles + tile)];
      };
      phases.run(thread, phase, kTiles, compute, keep);
    }
  });
  verdict.in("a stopped thread of " + std::to_string(num_threads));
  for (size_t i = 0; i < kept.size(); ++i) verdict.close("times kept", i, kept[i], 1.0, 0.0);
  verdict.close("kept what another thread computed", 0, wrong, 0.0, 0.0);
  verdict.close("a tile computed again", 0, computed > kTiles * kPhases, 1.0, 0.0);
}

}  // namespace test
