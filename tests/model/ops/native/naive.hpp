// The kernels' meaning, written down a second time: in double, one number at a time, slow.
//
// Nothing here is shared with the kernels: the number formats, the layout of the cache and the
// order of the loops are written from their descriptions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.hpp"  // for the name of the instruction set alone

namespace naive {

struct Near {
  double value, tolerance;
};

inline double from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(double(mantissa), -24)
                                    : std::ldexp(double(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

inline double compute_bf16(int bits) {
  const int exponent = (bits >> 7) & 255, mantissa = bits & 127;
  if (exponent == 255) return std::nan("");  // infinities too: no check expects one
  const double size = exponent == 0 ? std::ldexp(double(mantissa), -133)
                                    : std::ldexp(double(128 + mantissa), exponent - 134);
  return bits & 0x8000 ? -size : size;
}

inline double from_bf16(uint16_t bits) {
  static const std::vector<double> all = [] {
    std::vector<double> values;
    for (int i = 0; i < 65536; ++i) values.push_back(compute_bf16(i));
    return values;
  }();
  return all[bits];
}

// The nearest value with eight bits of mantissa, ties to even.
inline double to_bf16(double value) {
  int exponent;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(fraction * 256.0), exponent - 8);
}

// `sizes` are what the roundings are relative to: |scale * q| + |minimum|.
struct Weights {
  int rows, cols;
  std::vector<double> values, sizes;  // [rows][cols]
  std::vector<double> bias;           // [rows] or empty
};

inline std::vector<double> rms_norm(const std::vector<double>& x, const float* weight, double eps) {
  double squares = 0.0;
  for (double v : x) squares += v * v;
  const double scale = 1.0 / std::sqrt(squares / double(x.size()) + eps);
  std::vector<double> out;
  for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] * scale * double(weight[i]));
  return out;
}

inline std::vector<double> silu_and_mul(const std::vector<double>& gate_up) {
  const size_t half = gate_up.size() / 2;
  std::vector<double> out;
  for (size_t i = 0; i < half; ++i)
    out.push_back(gate_up[i] / (1.0 + std::exp(-gate_up[i])) * gate_up[half + i]);
  return out;
}

// A row of activations as the matrix sees it. `doubt`: how far a value may be off because it lies
// so near the middle of two int8 that float and double may round it differently.
struct Activations {
  std::vector<double> x, doubt;
};

// int8 in groups of 32: d = largest / 127, q = x * (127 / largest) to nearest even, in float as
// the kernels' contract says. `exact`: x is float already, so that no rounding is in doubt.
inline Activations quantize(const std::vector<double>& x, bool exact) {
  Activations out;
  for (size_t g = 0; g < x.size(); g += 32) {
    float largest = 0.0f;
    for (size_t i = g; i < g + 32; ++i) largest = std::max(largest, std::fabs(float(x[i])));
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f, d = largest / 127.0f;
    for (size_t i = g; i < g + 32; ++i) {
      const float scaled = float(x[i]) * inverse;
      const double from_tie = std::fabs(double(scaled) - std::floor(double(scaled)) - 0.5);
      out.x.push_back(double(std::nearbyint(scaled)) * double(d));
      out.doubt.push_back(!exact && from_tie < 1e-3 ? double(d) : 0.0);
    }
  }
  return out;
}

// int8 twice, the second time what the first one left: the row itself, to half a step of that.
inline Activations quantize_twice(const std::vector<double>& x) {
  const Activations once = quantize(x, true);
  Activations out{x, {}};
  for (size_t g = 0; g < x.size(); g += 32) {
    double largest = 0.0;
    for (size_t i = g; i < g + 32; ++i) largest = std::max(largest, std::fabs(x[i] - once.x[i]));
    for (size_t i = g; i < g + 32; ++i)
      out.doubt.push_back(0.51 * largest / 127.0 + 1e-6 * std::fabs(x[i]));
  }
  return out;
}

inline std::vector<Near> multiply(const Weights& w, const Activations& a) {
  std::vector<Near> out;
  for (int r = 0; r < w.rows; ++r) {
    double sum = w.bias.empty() ? 0.0 : w.bias[size_t(r)];
    double size = std::fabs(sum), doubt = 0.0;
    for (int c = 0; c < w.cols; ++c) {
      const size_t at = size_t(r) * size_t(w.cols) + size_t(c);
      sum += w.values[at] * a.x[size_t(c)];
      size += w.sizes[at] * std::fabs(a.x[size_t(c)]);
      doubt += w.sizes[at] * a.doubt[size_t(c)];
    }
    out.push_back({sum, 3e-6 * size + doubt + 1e-30});
  }
  return out;
}

// Where K and V of a token lie, counted in bf16 values from the start of a layer:
// [K, V][runs][kv heads][32 blocks][block_size / 16][tile], a K tile [dim / 2][16 tokens][2], a V
// tile [8 pairs of tokens][dim][2].
struct Layout {
  int64_t num_runs;
  int num_kv_heads, head_dim, block_size;

  int64_t size() const { return 2 * num_runs * 32 * num_kv_heads * block_size * head_dim; }
  int64_t tile(int64_t slot, int head) const {
    const int64_t block = slot / block_size, tile_of_block = slot % block_size / 16;
    const int64_t place = (block / 32 * num_kv_heads + head) * 32 + block % 32;
    return (place * (block_size / 16) + tile_of_block) * 16 * head_dim;
  }
  int64_t key(int64_t slot, int head, int d) const {
    return tile(slot, head) + d / 2 * 32 + slot % 16 * 2 + d % 2;
  }
  int64_t value(int64_t slot, int head, int d) const {
    return size() / 2 + tile(slot, head) + slot % 16 / 2 * 2 * head_dim + d * 2 + slot % 2;
  }
};

// Rotate pairs (i, i + rotary / 2), then scale all.
inline void rotate(std::vector<double>& x, const float* cos, const float* sin, int rotary,
                   double scale) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    const double a = x[size_t(i)], b = x[size_t(i + half)];
    x[size_t(i)] = a * double(cos[i]) - b * double(sin[i]);
    x[size_t(i + half)] = b * double(cos[i]) + a * double(sin[i]);
  }
  for (double& v : x) v *= scale;
}

// softmax of base 2 over keys [lowest, position], in one go. `q` is scaled already. Where the CPU
// multiplies bf16, the query is rounded to it first, and so is each probability on its way to the
// values: half a step of bf16.
#if HW_BF16
inline double factor(float q) { return to_bf16(double(q)); }
constexpr double kProbabilityError = 1.0 / 256.0;
#else
inline double factor(float q) { return double(q); }
constexpr double kProbabilityError = 0.0;
#endif

inline std::vector<Near> attend(const Layout& layout, const uint16_t* kv, int head, const float* q,
                                const std::vector<int64_t>& slots, int lowest, int position) {
  std::vector<double> scores;
  double top = -1e300, largest = 0.0;
  for (int key = lowest; key <= position; ++key) {
    double score = 0.0;
    for (int d = 0; d < layout.head_dim; ++d)
      score += factor(q[d]) * from_bf16(kv[layout.key(slots[size_t(key)], head, d)]);
    scores.push_back(score);
    top = std::max(top, score);
    largest = std::max(largest, std::fabs(score));
  }
  double total = 0.0;
  for (double& score : scores) total += score = std::exp2(score - top);
  std::vector<Near> out;
  for (int d = 0; d < layout.head_dim; ++d) {
    double sum = 0.0, size = 0.0;
    for (int key = lowest; key <= position; ++key) {
      const double v = from_bf16(kv[layout.value(slots[size_t(key)], head, d)]);
      sum += scores[size_t(key - lowest)] * v;
      size += scores[size_t(key - lowest)] * std::fabs(v);
    }
    out.push_back({sum / total, (2e-6 * (2.0 + largest) + kProbabilityError) * size / total});
  }
  return out;
}

}  // namespace naive
