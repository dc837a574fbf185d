// What the checks are made of: buffers that end where they say, numbers from a seed, and a verdict.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace test {

// A buffer of its own on the heap, exactly as long as it says: one element too far is seen by
// AddressSanitizer. `alignment` only where the kernels are promised one (packed matrices).
template <class T>
class Exact {
 public:
  explicit Exact(size_t count = 0, T fill = T(), size_t alignment = 16) : count_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, count * sizeof(T)) != 0) std::abort();
    data_ = static_cast<T*>(memory);
    for (size_t i = 0; i < count; ++i) data_[i] = fill;
  }
  explicit Exact(const std::vector<T>& values) : Exact(values.size()) {
    for (size_t i = 0; i < count_; ++i) data_[i] = values[i];
  }
  Exact(const Exact& other) : Exact(other.count_) {
    if (count_ != 0) std::memcpy(data_, other.data_, bytes());
  }
  Exact(Exact&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  Exact& operator=(Exact other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Exact() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

// xorshift64*: the same numbers everywhere (Vigna 2016).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  uint32_t bits() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return uint32_t((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  int below(int n) { return int(bits() % uint32_t(n)); }
  double uniform() { return bits() / 4294967296.0; }
  float normal() {  // near enough: the sum of twelve uniforms
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return float(sum);
  }
  void fill(Exact<float>& values, float scale = 1.0f) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = scale * normal();
  }

 private:
  uint64_t state_;
};

// Counts what was compared; the first mismatch ends the program with its place.
class Verdict {
 public:
  void in(std::string place) { place_ = std::move(place); }

  // |got - expected| <= tolerance; NaN never is.
  void close(const char* what, size_t index, double got, double expected, double tolerance) {
    ++count_;
    if (std::fabs(got - expected) <= tolerance) return;
    std::fprintf(stderr, "MISMATCH %s: %s[%zu] is %.9g, expected %.9g within %.3g\n",
                 place_.c_str(), what, index, got, expected, tolerance);
    std::exit(1);
  }

  template <class T>
  void same_bits(const char* what, const T* got, const T* expected, size_t count) {
    ++count_;
    for (size_t i = 0; i < count; ++i) {
      if (std::memcmp(got + i, expected + i, sizeof(T)) == 0) continue;
      std::fprintf(stderr, "MISMATCH %s: %s[%zu] has other bits: %.9g and %.9g\n", place_.c_str(),
                   what, i, double(got[i]), double(expected[i]));
      std::exit(1);
    }
  }

  long count() const { return count_; }

 private:
  std::string place_;
  long count_ = 0;
};

inline Verdict verdict;

}  // namespace test
