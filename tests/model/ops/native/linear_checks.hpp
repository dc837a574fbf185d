// Checks of matrices, transforms, embeddings and norms.
#pragma once

#include "matrices.hpp"

namespace test {

inline const char* kind_name(int kind) {
  const char* names[] = {"Q4", "Q8", "BF16", "F32"};
  return names[kind];
}

struct LinearCase {
  int kind;
  std::vector<int> parts;
  int cols;
  int transform;  // Transform
  bool add, bias;
  Values values = Values::kRandom;
  bool twice = false;  // quantise rows in two parts

  std::string name() const {
    int rows = 0;
    for (int part : parts) rows += part;
    const char* transforms[] = {"plain", "normed", "silu"};
    return std::string("linear ") + kind_name(kind) + " " + std::to_string(rows) + "x" +
           std::to_string(cols) + " " + transforms[transform] + (add ? " add" : " store") +
           (bias ? " bias" : "") + (values == Values::kExtreme ? " extreme" : "") +
           (twice ? " twice" : "");
  }
};

constexpr float kEps = 1e-5f;

inline naive::Activations activations(const LinearCase& c, const std::vector<double>& x,
                                      const float* norm) {
  std::vector<double> row = x;
  if (c.transform == kNormed) row = naive::rms_norm(x, norm, double(kEps));
  if (c.transform == kSilu) row = naive::silu_and_mul(x);
  if (c.twice) return naive::quantize_twice(row);
  if (c.kind == kQ4 || c.kind == kQ8) return naive::quantize(row, c.transform == kPlain);
  const std::vector<double> none(row.size(), 0.0);
  return {row, none};
}

// All rows against the naive product; then fewer rows and other threads against the same bits.
inline void check_linear(const LinearCase& c, const std::vector<int>& row_counts,
                         const std::vector<int>& threads, uint64_t seed) {
  Random random(seed);
  const TestMatrix matrix = make_matrix(c.kind, c.parts, c.cols, c.bias, random, c.values);
  const int rows = matrix.weights.rows, width = c.transform == kSilu ? 2 * c.cols : c.cols;
  Exact<float> norm{size_t(c.cols)};
  random.fill(norm);
  int most = 0;
  for (int count : row_counts) most = std::max(most, count);
  Exact<float> x{size_t(most) * size_t(width)}, before{size_t(most) * size_t(rows)}, whole;
  random.fill(x, c.transform == kSilu ? 4.0f : 1.0f);
  random.fill(before);
  if (c.values == Values::kExtreme)
    for (size_t i = 0; i < x.size(); ++i) x[i] = i / size_t(width) % 2 ? 127.0f : -127.0f;
  if (most > 2)  // a row of zeros has no scale
    for (int i = 0; i < width; ++i) x[size_t(2 * width + i)] = 0.0f;

  Instruction op = instruction(kLinear, 0, 1, Transform(c.transform));
  op.add = c.add;
  op.parts = c.twice ? 2 : 1;
  op.eps = kEps;
  op.matrix = matrix.c();
  op.norm = c.transform == kNormed ? norm.data() : nullptr;
  for (size_t trial = 0; trial < row_counts.size() * threads.size(); ++trial) {
    const int count = trial == 0 ? most : row_counts[trial % row_counts.size()];
    const int team = threads[trial / row_counts.size()];
    verdict.in(c.name() + ", " + std::to_string(count) + " rows, " + std::to_string(team) +
               " threads");
    Buffers buffers{count, {}, {}};
    buffers.add(width);
    buffers.add(rows);
    std::memcpy(buffers.data[0].data(), x.data(), buffers.data[0].bytes());
    if (c.add) std::memcpy(buffers.data[1].data(), before.data(), buffers.data[1].bytes());
    run_fresh(team, {op}, buffers);
    verdict.same_bits("input", buffers.data[0].data(), x.data(), buffers.data[0].size());
    if (trial != 0) {
      verdict.same_bits("output", buffers.data[1].data(), whole.data(), buffers.data[1].size());
      continue;
    }
    whole = buffers.data[1];
    for (int t = 0; t < count; ++t) {
      const auto expected =
          naive::multiply(matrix.weights, activations(c, buffers.row(0, t), norm.data()));
      for (int r = 0; r < rows; ++r) {
        const size_t at = size_t(t) * size_t(rows) + size_t(r);
        const double start = c.add ? double(before[at]) : 0.0;
        verdict.close("output", at, double(whole[at]), expected[size_t(r)].value + start,
                      expected[size_t(r)].tolerance + 1e-6 * std::fabs(start));
      }
    }
  }
}

inline void check_embedding(int kind, int threads) {
  Random random(uint64_t(kind) + 7);
  verdict.in(std::string("embed ") + kind_name(kind));
  const TestMatrix table = make_matrix(kind, {50}, 96, false, random);
  const Exact<int64_t> ids(std::vector<int64_t>{0, 49, 17, 16, 15, 3, 49});
  Buffers buffers{int(ids.size()), {}, {}};
  buffers.add(96);
  Instruction op = instruction(kEmbed, 0, 0);
  op.matrix = table.c();
  Step step{};
  step.token_ids = ids.data();
  run_fresh(threads, {op}, buffers, {}, step);
  for (size_t t = 0; t < ids.size(); ++t)
    for (size_t i = 0; i < 96; ++i) {
      const size_t at = size_t(ids[t]) * 96 + i;
      verdict.close("embedding", t * 96 + i, double(buffers.data[0][t * 96 + i]),
                    table.weights.values[at], 2e-7 * table.weights.sizes[at]);
    }
}

inline void check_norm(int tokens, int width, int threads) {
  Random random{uint64_t(width)};
  verdict.in("norm of " + std::to_string(width));
  Exact<float> weight{size_t(width)};
  random.fill(weight);
  Buffers buffers{tokens, {}, {}};
  buffers.add(width);
  buffers.add(width);
  random.fill(buffers.data[0], 3.0f);
  Instruction op = instruction(kNorm, 0, 1);
  op.norm = weight.data();
  op.eps = kEps;
  run_fresh(threads, {op}, buffers);
  for (int t = 0; t < tokens; ++t) {
    const auto expected = naive::rms_norm(buffers.row(0, t), weight.data(), double(kEps));
    for (int i = 0; i < width; ++i)
      verdict.close("norm", size_t(i), buffers.row(1, t)[size_t(i)], expected[size_t(i)],
                    2e-6 * std::fabs(expected[size_t(i)]));
  }
}

// Values at which e^-x overflows, underflows or is one, alone in their group.
inline void check_silu_edges() {
  verdict.in("silu at its edges");
  const std::vector<float> gates{-1000.0f, 1000.0f, 0.0f, -88.0f, 88.0f, -87.0f, 1e-30f, -20.0f};
  Random random(3);
  const LinearCase c{kF32, {int(gates.size())}, 16, kSilu, false, false};
  const TestMatrix matrix = make_matrix(kF32, c.parts, 16, false, random);
  Buffers buffers{int(gates.size()), {}, {}};
  buffers.add(32);
  buffers.add(int(gates.size()));
  for (size_t t = 0; t < gates.size(); ++t)
    for (size_t i = 0; i < 32; ++i) buffers.data[0][t * 32 + i] = i < 16 ? gates[t] : 1.0f;
  Instruction op = instruction(kLinear, 0, 1, kSilu);
  op.matrix = matrix.c();
  run_fresh(1, {op}, buffers);
  for (int t = 0; t < int(gates.size()); ++t) {
    const auto expected =
        naive::multiply(matrix.weights, activations(c, buffers.row(0, t), nullptr));
    for (size_t r = 0; r < expected.size(); ++r)
      verdict.close("silu", r, buffers.row(1, t)[r], expected[r].value,
                    expected[r].tolerance + 1e-32);
  }
}

}  // namespace test
