// What happens to one row of activations on its way into a matrix: norm, silu, quantisation.
//
// A row is quantised to int8 in groups of 32 with a scale d each; beside it goes the sum of what was
// really kept, d * sum(q), for weights that have a minimum. Everything here is done row by row in
// one order, so a row has the same bits in any batch.
#pragma once

#include <cmath>

#include "simd.hpp"

namespace hw {

constexpr int kGroup = 32;
constexpr float kLog2e = 1.44269504088896340736f;

// x / sqrt(mean(x^2) + eps) * weight; n is a multiple of 16.
inline void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  F16 squares = zero();
  for (int i = 0; i < n; i += 16) squares = fma(load(x + i), load(x + i), squares);
  const F16 scale = splat(1.0f / std::sqrt(sum_lanes(squares) / float(n) + eps));
  for (int i = 0; i < n; i += 16) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

// silu(gate) * up with silu(g) = g / (1 + e^-g); gate and up lie one behind the other.
inline void silu_and_mul(const float* gate_up, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    const F16 gate = load(gate_up + i);
    const F16 power = max(mul(gate, splat(kLog2e)), splat(-126.0f));
    const F16 one_and = add(splat(1.0f), exp2(mul(power, splat(-1.0f))));
    store(out + i, mul(divide(gate, one_and), load(gate_up + n + i)));
  }
}

// A quantised row: n int8, then n / 32 scales and n / 32 sums.
struct QuantRow {
  int8_t* q;
  float* d;
  float* s;
};

inline QuantRow quant_row(char* base, int n, int row) {
  const size_t size = size_t(n) + size_t(n / kGroup) * 8;
  char* start = base + size * row;
  float* scales = reinterpret_cast<float*>(start + n);
  return {reinterpret_cast<int8_t*>(start), scales, scales + n / kGroup};
}

inline size_t quant_bytes(int n) { return size_t(n) + size_t(n / kGroup) * 8; }

// n is a multiple of 32.
inline void quantize(const float* x, int n, QuantRow out) {
  for (int g = 0; g < n / kGroup; ++g) {
    const F16 a = load(x + g * kGroup), b = load(x + g * kGroup + 16);
    const float largest = max_lanes(max(abs(a), abs(b)));
    const F16 inverse = splat(largest > 0.0f ? 127.0f / largest : 0.0f);
    const F16 qa = round(mul(a, inverse)), qb = round(mul(b, inverse));
    store_int8(out.q + g * kGroup, qa);
    store_int8(out.q + g * kGroup + 16, qb);
    out.d[g] = largest / 127.0f;
    out.s[g] = out.d[g] * sum_lanes(add(qa, qb));
  }
}

}  // namespace hw
