// A team of threads for one parallel region per call: short spins inside it, sleep outside.
//
// The cores are shared with others, so nobody waits for a thread, only for work that it has begun.
// A phase is over when its tiles are done, whoever did them; a thread that comes late finds what is
// left, or the region closed; what a stopped thread was at, another one does. One that waits spins
// for a few microseconds, then lets others have its core as long as it may still be of use, and then
// sleeps in the kernel.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
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

// Where a test stops threads.
#ifndef HW_STALL
#define HW_STALL(thread) (void)(thread)
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

// A clock for short times: some 0.3 to 1 ns a tick.
inline uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

// In ticks: some 30 to 100 microseconds; longer where a thread does not know how long a tile takes.
constexpr uint64_t kPatience = 100000, kNewcomerPatience = 10 * kPatience;

#if defined(__SANITIZE_THREAD__)
constexpr bool kTakesOver = false;  // what a stopped thread reads is a race, if one without effect
#else
constexpr bool kTakesOver = true;
#endif

// The phases of a region, one after the other. The tiles 0 .. count - 1 of each are given once. Each
// thread has a range of neighbours, so that it reads memory in one direction, and then takes from
// the ranges of others what they have not begun.
//
// A tile is computed into memory of the thread's own, then kept: written to where it belongs, by
// whoever has it first. For when the system stops a thread in the midst of a tile, for a millisecond
// or more, the others would all wait for it: one that has nothing else to do computes the tile anew.
// What the stopped one computed is dropped when it comes back. It may have read what others were
// writing by then, so computing must be no worse for it than a wrong result.
class Phases {
 public:
  explicit Phases(int threads) : threads_(threads), claims_(size_t(threads)) {}

  // Before the region begins.
  void reset(int count) {
    const size_t size = size_t(count) * size_t(threads_);
    if (progress_.size() < size) progress_ = std::vector<Progress>(size);
    for (size_t i = 0; i < size; ++i) {
      progress_[i].next.store(0, std::memory_order_relaxed);
      progress_[i].kept.store(0, std::memory_order_relaxed);
    }
  }

  // Tiles of phase `number`, as long as there are any; returns when all are done. Neither `compute`
  // nor `keep` may touch anything outside: another thread may be phases ahead of one that got no
  // tile.
  template <class Compute, class Keep>
  void run(int thread, int number, int count, Compute&& compute, Keep&& keep) {
    Progress* progress = progress_.data() + size_t(number) * size_t(threads_);
    int mine = 0;
    const auto finish = [&](std::atomic<uint64_t>& whose, uint64_t claimed, int tile) {
      HW_STALL(thread);
      if (!whose.compare_exchange_strong(claimed, 0)) return;  // another one has kept it
      keep(tile);
      progress[thread].kept.store(++mine);
    };
    const auto done = [&] {
      int sum = 0;
      for (int i = 0; i < threads_; ++i) sum += progress[i].kept.load();
      return sum == count;
    };
    auto& claim = claims_[size_t(thread)].value;
    uint64_t longest = 0, at = ticks();
    for (int i = 0; i < threads_; ++i) {
      const int64_t range = (thread + i) % threads_;
      const int begin = int(count * range / threads_), end = int(count * (range + 1) / threads_);
      auto& next = progress[range].next;
      for (int tile; (tile = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) {
        const uint64_t this_one = uint64_t(number) << 32 | uint64_t(tile) << 1 | 1;
        claim.store(this_one, std::memory_order_release);
        compute(tile);
        finish(claim, this_one, tile);
        const uint64_t now = ticks();
        longest = std::max(longest, now - at);
        at = now;
      }
    }
    if (done()) {  // of threads that end at once, one at least sees it
      if (mine != 0) over_.next();
      return;
    }
    // Four times as long as my longest tile is more than anybody needs who was not stopped.
    const uint64_t patience = longest == 0 ? kNewcomerPatience : std::max(kPatience, 4 * longest);
    for (int spins = 0; ticks() - at < patience; ++spins) {
      if (done()) return;
      if (spins < kSpins) relax();
      else sched_yield();
    }
    for (int i = 1; kTakesOver && i < threads_ && !done(); ++i) {
      auto& other = claims_[size_t((thread + i) % threads_)].value;
      const uint64_t theirs = other.load(std::memory_order_acquire);
      const int tile = int(uint32_t(theirs) >> 1);
      if (!(theirs & 1) || int(theirs >> 32) != number) continue;
      compute(tile);
      finish(other, theirs, tile);
    }
    if (mine != 0 && done()) over_.next();
    over_.wait_until(done, 0);
  }

  // Tiles that nobody may take over.
  template <class Body>
  void run(int thread, int number, int count, Body&& body) {
    run(thread, number, count, [](int) {}, body);
  }

 private:
  // Of a thread in a phase: the first tile of its range that nobody has, and how many it has kept.
  struct alignas(64) Progress {
    std::atomic<int> next{0}, kept{0};
  };
  // What a thread computes: phase, tile and a 1; or 0.
  struct alignas(64) Claim {
    std::atomic<uint64_t> value{0};
  };

  const int threads_;
  std::vector<Progress> progress_;
  std::vector<Claim> claims_;
  Signal over_;
};

}  // namespace hw
