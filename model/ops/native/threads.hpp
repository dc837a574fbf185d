// A team of threads for one parallel region per call: short spins inside it, sleep outside.
//
// Work is claimed in tiles, so a core that another process steals costs its share and no more. A thread that waits at a barrier spins for a few microseconds and then sleeps in the
// kernel, for the one it waits for may have lost its core.
#pragma once

#include <atomic>
#include <climits>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hw {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A value that threads wait for: spin first, then sleep until it is changed.
class Signal {
 public:
  uint32_t get() const { return value_.load(std::memory_order_acquire); }

  void wait_while(uint32_t old, int spins) {
    for (int i = 0; i < spins; ++i) {
      if (get() != old) return;
      relax();
    }
    while (get() == old) {
      sleepers_.fetch_add(1);
      if (get() == old) syscall(SYS_futex, address(), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
      sleepers_.fetch_sub(1);
    }
  }

  void next() {
    value_.fetch_add(1);
    if (sleepers_.load() != 0)
      syscall(SYS_futex, address(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

 private:
  uint32_t* address() { return reinterpret_cast<uint32_t*>(&value_); }

  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

class Team {
 public:
  static constexpr int kSpins = 1200;  // about 30 to 50 microseconds of pauses

  explicit Team(int size) : size_(size < 1 ? 1 : size) {
    for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Team() {
    stopping_ = true;
    start_.next();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Run `work(thread)` on every thread of the team, the caller being thread 0.
  template <class Work>
  void run(Work&& work) {
    if (size_ == 1) {
      work(0);
      return;
    }
    work_ = [&work](int thread) { work(thread); };
    start_.next();
    work(0);
    barrier();  // all have left `work`
  }

  // All threads of the team meet here.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t phase = meet_.get();
    if (arrived_.fetch_add(1) + 1 == size_) {
      arrived_.store(0);
      meet_.next();
    } else {
      meet_.wait_while(phase, kSpins);
    }
  }

 private:
  void serve(int thread) {
    uint32_t seen = 0;
    for (;;) {
      start_.wait_while(seen, 0);
      seen = start_.get();
      if (stopping_) return;
      work_(thread);
      barrier();
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  std::function<void(int)> work_;
  Signal start_, meet_;
  std::atomic<int> arrived_{0};
  std::atomic<bool> stopping_{false};
};

// Tiles 0 .. count - 1, each given once. Each thread has a range of neighbours, so that it reads
// memory in one direction, and then takes from the ranges of others what they have not begun.
class Tiles {
 public:
  explicit Tiles(int threads) : next_(size_t(threads)) {}

  void reset() {
    for (Counter& one : next_) one.value.store(0, std::memory_order_relaxed);
  }

  template <class Body>
  void run(int thread, int count, Body&& body) {
    const int threads = int(next_.size());
    for (int i = 0; i < threads; ++i) {
      const int64_t whose = (thread + i) % threads;
      const int begin = int(count * whose / threads), end = int(count * (whose + 1) / threads);
      auto& next = next_[size_t(whose)].value;
      for (int tile; (tile = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;)
        body(tile);
    }
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  std::vector<Counter> next_;
};

}  // namespace hw
