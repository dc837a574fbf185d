// A team of threads for one parallel region per call: short spins inside it, sleep outside.
//
// The cores are shared with others, so nobody waits for a thread, only for work that it has begun.
// A phase is over when its tiles are done, whoever did them; a thread that comes late finds what is
// left, or the region closed. One that waits spins for a few microseconds and then sleeps in the
// kernel.
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

constexpr int kSpins = 1200;  // some 20 to 50 microseconds of pauses

// Something has changed: threads wait here until it is what they want.
class Signal {
 public:
  uint32_t get() const { return value_.load(std::memory_order_acquire); }

  template <class Done>
  void wait_until(Done&& done, int spins) {
    for (int i = 0; i < spins; ++i) {
      if (done()) return;
      relax();
    }
    for (;;) {
      const uint32_t seen = get();
      if (done()) return;
      sleepers_.fetch_add(1);
      if (value_.load() == seen)
        syscall(SYS_futex, address(), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
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
  explicit Team(int size) : size_(size < 1 ? 1 : size) {
    for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Team() {
    stopping_ = true;
    start_.next();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Run `work(thread)` on the threads of the team that come in time, the caller being thread 0. It
  // must do all there is to do even on its own.
  template <class Work>
  void run(Work&& work) {
    if (size_ == 1) {
      work(0);
      return;
    }
    work_ = [&work](int thread) { work(thread); };
    open_.store(true);
    start_.next();
    work(0);
    open_.store(false);
    left_.wait_until([this] { return inside_.load() == 0; }, kSpins);
  }

 private:
  void serve(int thread) {
    uint32_t seen = 0;
    for (;;) {
      start_.wait_until([&] { return start_.get() != seen; }, 0);
      seen = start_.get();
      if (stopping_) return;
      inside_.fetch_add(1);
      if (open_.load()) work_(thread);
      if (inside_.fetch_sub(1) == 1) left_.next();
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  std::function<void(int)> work_;
  Signal start_, left_;
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<bool> stopping_{false};
};

// The phases of a region, one after the other. The tiles 0 .. count - 1 of each are given once. Each
// thread has a range of neighbours, so that it reads memory in one direction, and then takes from
// the ranges of others what they have not begun.
class Phases {
 public:
  explicit Phases(int threads) : threads_(threads) {}

  // Before the region begins.
  void reset(int count) {
    const size_t size = size_t(count) * size_t(threads_ + 1);
    if (counters_.size() < size) counters_ = std::vector<Counter>(size);
    for (size_t i = 0; i < size; ++i) counters_[i].value.store(0, std::memory_order_relaxed);
  }

  // Tiles of phase `number`, as long as there are any; returns when all are done. `body` must touch
  // nothing outside: another thread may be phases ahead of one that got no tile.
  template <class Body>
  void run(int thread, int number, int count, Body&& body) {
    Counter* counters = counters_.data() + size_t(number) * size_t(threads_ + 1);
    auto& done = counters[threads_].value;
    int mine = 0;
    for (int i = 0; i < threads_; ++i) {
      const int64_t whose = (thread + i) % threads_;
      const int begin = int(count * whose / threads_), end = int(count * (whose + 1) / threads_);
      auto& next = counters[whose].value;
      for (int tile; (tile = begin + next.fetch_add(1, std::memory_order_relaxed)) < end; ++mine)
        body(tile);
    }
    if (mine != 0 && done.fetch_add(mine) + mine == count) over_.next();
    over_.wait_until([&] { return done.load(std::memory_order_acquire) == count; }, kSpins);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  const int threads_;
  std::vector<Counter> counters_;
  Signal over_;
};

}  // namespace hw
