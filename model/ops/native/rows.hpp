// What happens to one row of activations on its way into a matrix: norm, silu, quantisation.
//
// A row is quantised to int8 in groups of 32 with a scale d each; beside it goes the sum of what was
// really kept, d * sum(q), for weights that have a minimum. What is lost may be quantised once more,
// as a second row. Everything here is done row by row in one order, so a row has the same bits in
// any batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

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

inline void add_to(float* y, const float* x, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, add(load(y + i), load(x + i)));
  for (; i < n; ++i) y[i] += x[i];
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

// A group of a quantised row: 32 int8, their scale, their sum times the scale, their sum.
struct QuantGroup {
  int8_t q[kGroup];
  float d, s;
  int32_t sum, padding;
};

// Quantised rows lie in blocks of 8 (the last one has what is left), group by group: those of a
// block that belong together are neighbours. Group g of a row is first[g * stride].
constexpr int kRowBlock = 8;

struct QuantRow {
  QuantGroup* first;
  int stride;
};

inline QuantRow quant_row(char* rows, int num_rows, int n, int row) {
  const int block = row / kRowBlock * kRowBlock;
  QuantGroup* groups = reinterpret_cast<QuantGroup*>(rows) + size_t(block) * (n / kGroup);
  return {groups + row % kRowBlock, std::min(kRowBlock, num_rows - block)};
}

inline size_t quant_bytes(int n) { return size_t(n / kGroup) * sizeof(QuantGroup); }

// n is a multiple of 32.
inline void quantize(const float* x, int n, QuantRow out) {
  for (int g = 0; g < n / kGroup; ++g) {
    QuantGroup& group = out.first[size_t(g) * out.stride];
    const F16 a = load(x + g * kGroup), b = load(x + g * kGroup + 16);
    const float largest = max_lanes(max(abs(a), abs(b)));
    const F16 inverse = splat(largest > 0.0f ? 127.0f / largest : 0.0f);
    const F16 qa = round(mul(a, inverse)), qb = round(mul(b, inverse));
    store_int8(group.q, qa);
    store_int8(group.q + 16, qb);
    const float sum = sum_lanes(add(qa, qb));
    group.d = largest / 127.0f;
    group.s = group.d * sum;
    group.sum = int32_t(sum);
  }
}

// What quantising took from a row: x - d * q.
inline void take_away(float* x, int n, QuantRow kept) {
  for (int g = 0; g < n / kGroup; ++g) {
    const QuantGroup& group = kept.first[size_t(g) * kept.stride];
    for (int i = 0; i < kGroup; i += 16) {
      float* at = x + g * kGroup + i;
      store(at, fma(load_int8(group.q + i), splat(-group.d), load(at)));
    }
  }
}

}  // namespace hw
