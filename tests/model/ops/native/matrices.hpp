// Random matrices of each kind, packed by the kernels from the blocks of a file, with their exact
// values beside them. And one program of one or a few instructions, run on buffers.
#pragma once

#include "exact.hpp"
#include "naive.hpp"
#include "native.cpp"

namespace test {

enum class Values { kRandom, kExtreme };

struct TestMatrix {
  int kind;
  naive::Weights weights;
  Exact<uint8_t> packed;
  Exact<float> bias;

  Matrix c() const {
    const float* to_add = bias.size() ? bias.data() : nullptr;
    return {kind, weights.rows, weights.cols, 0, packed.data(), to_add};
  }
};

// A finite half: of either sign, between 2^-7 and 2, now and then subnormal.
inline uint16_t random_half(Random& random) {
  const int exponent = random.below(16) == 0 ? 0 : 8 + random.below(8);
  return uint16_t(random.below(2) << 15 | exponent << 10 | random.below(1024));
}

inline void put(std::vector<uint8_t>& bytes, uint32_t value, int count) {
  for (int i = 0; i < count; ++i) bytes.push_back(uint8_t(value >> (8 * i)));
}

// One group of a row, 32 weights: its bytes as in a file, its values to `w`. Extreme values are
// those with the largest products: all 15, or all 127 with one sign.
inline void add_group(int kind, Values how, Random& random, std::vector<uint8_t>& bytes,
                      naive::Weights& w) {
  const bool extreme = how == Values::kExtreme;
  const uint16_t scale = extreme ? 0x3c00 : random_half(random);
  put(bytes, scale, 2);
  const double step = naive::from_half(scale);
  if (kind == kQ4) {
    const uint16_t minimum = random_half(random);
    put(bytes, minimum, 2);
    int q[32];
    for (int& each : q) each = extreme ? 15 : random.below(16);
    for (int i = 0; i < 16; ++i) bytes.push_back(uint8_t(q[i] | q[16 + i] << 4));
    for (int each : q) {
      w.values.push_back(step * each + naive::from_half(minimum));
      w.sizes.push_back(std::fabs(step) * each + std::fabs(naive::from_half(minimum)));
    }
    return;
  }
  const int sign = random.below(2) ? 1 : -1;
  for (int i = 0; i < 32; ++i) {
    const int q = extreme ? sign * 127 : random.below(255) - 127;
    bytes.push_back(uint8_t(q));
    w.values.push_back(step * q);
    w.sizes.push_back(std::fabs(step * q));
  }
}

inline void add_plain(int kind, Random& random, std::vector<uint8_t>& bytes, naive::Weights& w) {
  const float value = random.normal();
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (kind == kBF16) {
    put(bytes, bits >> 16, 2);
    w.values.push_back(naive::from_bf16(uint16_t(bits >> 16)));
  } else {
    put(bytes, bits, 4);
    w.values.push_back(double(value));
  }
  w.sizes.push_back(std::fabs(w.values.back()));
}

// `parts`: how many rows come from each of several matrices packed one behind the other.
inline TestMatrix make_matrix(int kind, const std::vector<int>& parts, int cols, bool with_bias,
                              Random& random, Values how = Values::kRandom) {
  TestMatrix m;
  m.kind = kind;
  const bool quantized = kind == kQ4 || kind == kQ8;
  int rows = 0;
  for (int part : parts) rows += part;
  m.weights = {rows, cols, {}, {}, {}};
  const size_t strips = size_t(rows + 15) / 16;
  m.packed = Exact<uint8_t>(strips * size_t(hw_strip_bytes(kind, cols)), 0, 64);
  int row = 0;
  for (int part : parts) {
    std::vector<uint8_t> bytes;
    for (int i = 0; i < part * cols; i += quantized ? 32 : 1) {
      if (quantized) add_group(kind, how, random, bytes, m.weights);
      else add_plain(kind, random, bytes, m.weights);
    }
    const Exact<uint8_t> source(bytes);
    hw_pack(kind, source.data(), row, part, cols, m.packed.data());
    row += part;
  }
  if (with_bias) {
    m.bias = Exact<float>(strips * 16, 0.0f);
    for (int r = 0; r < rows; ++r) {
      m.bias[size_t(r)] = random.normal();
      m.weights.bias.push_back(double(m.bias[size_t(r)]));
    }
  }
  return m;
}

// The buffers of a program, each [tokens][width]. New ones hold NaN: what is not written, shows.
struct Buffers {
  int tokens;
  std::vector<int32_t> widths;
  std::vector<Exact<float>> data;

  int add(int width) {
    widths.push_back(width);
    data.emplace_back(size_t(tokens) * size_t(width), std::nanf(""));
    return int(data.size()) - 1;
  }
  std::vector<double> row(int buffer, int t) const {
    const float* from = data[size_t(buffer)].data() + size_t(t) * size_t(widths[size_t(buffer)]);
    return {from, from + widths[size_t(buffer)]};
  }
};

inline Instruction instruction(Op op, int in, int out, Transform transform = kPlain) {
  Instruction made{};
  made.op = op;
  made.transform = transform;
  made.in = in;
  made.out = out;
  made.parts = 1;
  return made;
}

// One call of `hw_run`. `model` and `step` bring what attention needs; the rest is filled in here.
inline void run(void* engine, const std::vector<Instruction>& program, Buffers& buffers,
                Model model = {}, Step step = {}) {
  const std::vector<Instruction> exact(program.begin(), program.end());
  std::vector<float*> pointers;
  for (auto& data : buffers.data) pointers.push_back(data.data());
  model.num_instructions = int32_t(exact.size());
  model.instructions = exact.data();
  step.num_tokens = buffers.tokens;
  step.num_buffers = int32_t(pointers.size());
  step.buffers = pointers.data();
  step.widths = buffers.widths.data();
  hw_run(engine, &model, &step);
}

// The same on an engine of its own, whose scratch is then exactly as large as this run needs.
inline void run_fresh(int threads, const std::vector<Instruction>& program, Buffers& buffers,
                      Model model = {}, Step step = {}) {
  void* engine = hw_create(threads);
  run(engine, program, buffers, model, step);
  hw_destroy(engine);
}

}  // namespace test
