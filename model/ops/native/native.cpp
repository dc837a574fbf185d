// The native ops: a program of a few instructions over buffers of floats, run by a team of threads
// in one call for each step. `native.py` records the program from the decoder; nothing here knows
// what a model looks like.
//
// The rule that all of it obeys: each element of a result is computed in one fixed order, whatever
// the number of rows, the chunk, the batch, the block table or the threads. So cached = computed =
// batched, bit for bit.
#include <cstdio>
#include <memory>

#include "attention.hpp"
#include "linear.hpp"
#include "sampling.hpp"
#include "threads.hpp"

using namespace hw;

namespace {

enum Op : int32_t { kEmbed = 0, kLinear = 1, kRopeKV = 2, kAttend = 3, kNorm = 4 };
enum Transform : int32_t { kPlain = 0, kNormed = 1, kSilu = 2 };

// Mirrored field for field in native.py.
struct Instruction {
  int32_t op, transform;
  int32_t in, out;  // buffers
  int32_t add;      // linear: add to `out` instead of storing
  int32_t layer, window;
  float eps;
  int32_t parts, padding;  // linear: int8 parts of a quantised row, 1 or 2
  Matrix matrix;           // embed, linear
  const float* norm;     // linear with kNormed, norm
  const float* q_norm;   // rope: norms of the heads before they turn, or null
  const float* k_norm;
};

struct Model {
  Heads heads;
  int32_t rotary, num_instructions;
  const Instruction* instructions;
};

// One step. T tokens of S sequences.
struct Step {
  int32_t num_tokens, num_sequences, max_blocks, num_buffers;
  const int64_t *token_ids, *positions, *slots;
  const int64_t* block_tables;  // [S][max_blocks]
  const int32_t *query_start, *seq_lens;
  const float *cos, *sin;  // [max positions][rotary / 2]
  uint16_t* kv;            // [layers][2][runs]...
  int64_t num_runs, layer_stride;  // in elements
  float* const* buffers;   // [num_buffers]
  const int32_t* widths;   // floats in a row of each buffer
};

constexpr int kFewRows = 4;    // up to here each thread prepares the rows for itself: no barrier
constexpr int kRowsAtOnce = 64;  // rows of one claimed tile of a large product
constexpr int kMostStrips = 8;   // strips of one
constexpr int kMostResults = kMostStrips * kStrip * kRowsAtOnce;

struct Engine {
  explicit Engine(int threads)
      : team(threads),
        phases(threads),
        scratch(size_t(threads)),
        samplers(size_t(threads)) {}

  Team team;
  Phases phases;
  std::vector<std::vector<char>> scratch;  // of each thread
  std::vector<char> rows;                  // prepared rows, shared
  std::vector<Partial> partials;
  std::vector<float> partial_acc;
  std::vector<RowSampler> samplers;  // of each thread
};

class Run {
 public:
  Run(Engine& engine, const Model& model, const Step& step)
      : engine_(engine), model_(model), step_(step) {
    for (int s = 0; s < step.num_sequences; ++s)
      sequences_.push_back({step.query_start[s], step.query_start[s + 1] - step.query_start[s],
                            step.seq_lens[s], step.block_tables + size_t(s) * step.max_blocks});
    size_t row_bytes = 0, widest = 0;
    bool attends = false;
    for (int i = 0; i < model.num_instructions; ++i) {
      const Instruction& op = model.instructions[i];
      attends |= op.op == kAttend;
      if (op.op != kLinear) continue;
      row_bytes = std::max(row_bytes, prepared_bytes(op));
      widest = std::max(widest, size_t(op.matrix.cols));
    }
    if (attends) {
      work_ = plan(model.heads, sequences_.data(), step.num_sequences);
      grow(engine.partials, size_t(work_.num_partials));
      grow(engine.partial_acc, size_t(work_.num_partials) * model.heads.head_dim);
    }
    grow(engine.rows, row_bytes * step.num_tokens + 64);
    row_scratch_ = (widest * 4 + 63) / 64 * 64;
    const size_t products = row_scratch_ + row_bytes * kFewRows + sizeof(float) * kMostResults;
    const size_t attention = attends ? sizeof(float) * Scratch::size(model.heads) : 0;
    const size_t each = std::max(products, attention) + 128;
    for (auto& own : engine.scratch) grow(own, each);
    engine.phases.reset(2 * model.num_instructions);  // none has more than two
  }

  void operator()(int thread) {
    int phase = 0;
    for (int i = 0; i < model_.num_instructions; ++i) {
      const Instruction& op = model_.instructions[i];
      switch (op.op) {
        case kEmbed: by_token(thread, phase, [&](int t) { embed(op, t); }); break;
        case kLinear: linear(op, thread, phase); break;
        case kRopeKV: by_token(thread, phase, [&](int t) { rope_kv(op, t); }); break;
        case kAttend: attend(op, thread, phase); break;
        case kNorm:
          by_token(thread, phase, [&](int t) {
            rms_norm(row(op.in, t), op.norm, op.eps, step_.widths[op.in], row(op.out, t));
          });
          break;
      }
    }
  }

 private:
  template <class T>
  static void grow(std::vector<T>& v, size_t size) {
    if (v.size() < size) v.resize(size);
  }

  static size_t prepared_bytes(const Instruction& op) {
    const Matrix& m = op.matrix;
    return is_quantized(m) ? quant_bytes(m.cols) * op.parts : size_t(m.cols) * 4;
  }

  float* row(int buffer, int t) const {
    return step_.buffers[buffer] + size_t(t) * step_.widths[buffer];
  }

  static char* aligned(char* p) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
  }

  template <class... Body>
  void shared(int thread, int& phase, int count, Body&&... body) {
    engine_.phases.run(thread, phase++, count, body...);
  }

  template <class Body>
  void by_token(int thread, int& phase, Body&& body) {
    const int at_once = step_.num_tokens >= 64 ? 8 : 1;
    const int count = (step_.num_tokens + at_once - 1) / at_once;
    shared(thread, phase, count, [&](int i) {
      const int end = std::min(step_.num_tokens, (i + 1) * at_once);
      for (int t = i * at_once; t < end; ++t) body(t);
    });
  }

  void embed(const Instruction& op, int t) {
    unpack_row(op.matrix, int(step_.token_ids[t]), row(op.out, t));
  }

  // Row t on its way into the matrix: norm or silu, then int8 where the matrix is quantised. A
  // second part is what the first one left.
  void prepare(const Instruction& op, int t, char* own, char* rows) const {
    const int cols = op.matrix.cols;
    const bool quantized = is_quantized(op.matrix);
    const float* x = row(op.in, t);
    float* plain = quantized ? reinterpret_cast<float*>(own)
                             : reinterpret_cast<float*>(rows) + size_t(t) * cols;
    if (op.transform == kNormed) rms_norm(x, op.norm, op.eps, cols, plain);
    else if (op.transform == kSilu) silu_and_mul(x, cols, plain);
    else if (!quantized || op.parts == 2) std::memcpy(plain, x, size_t(cols) * 4);
    else plain = const_cast<float*>(x);
    if (!quantized) return;
    const int num_rows = step_.num_tokens * op.parts;
    const QuantRow first = quant_row(rows, num_rows, cols, t * op.parts);
    quantize(plain, cols, first);
    if (op.parts == 1) return;
    take_away(plain, cols, first);
    quantize(plain, cols, quant_row(rows, num_rows, cols, t * 2 + 1));
  }

  void linear(const Instruction& op, int thread, int& phase) {
    const int tokens = step_.num_tokens, parts = is_quantized(op.matrix) ? op.parts : 1;
    char* own = aligned(engine_.scratch[size_t(thread)].data());
    const bool few = tokens <= kFewRows;
    bool prepared = !few;
    char* rows = few ? own + row_scratch_ : aligned(engine_.rows.data());
    if (!few) by_token(thread, phase, [&](int t) { prepare(op, t, own, rows); });
    float* results = reinterpret_cast<float*>(aligned(few ? rows + prepared_bytes(op) * kFewRows : own));
    const int strips = num_strips(op.matrix), num_rows = tokens * parts;
    const int chunks = (num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
    // A few strips at a time where there are many, so that claiming costs nothing.
    const int at_once = std::max(1, std::min(kMostStrips, strips / (engine_.team.size() * 8)));
    const int groups = (strips + at_once - 1) / at_once;
    const int stride = at_once * kStrip;
    const auto compute = [&](int i) {
      const int first = i / chunks * at_once, chunk = i % chunks * kRowsAtOnce;
      const int last_row = std::min(num_rows, chunk + kRowsAtOnce);
      if (!prepared)  // a thread that gets no tile must not even look at the rows
        for (int t = 0; t < tokens; ++t) prepare(op, t, own, rows);
      prepared = true;
      const Output out{results, stride, first, chunk / parts, parts == 2};
      for (int strip = first; strip < std::min(strips, first + at_once); ++strip)
        strip_rows(op.matrix, strip, rows, num_rows, chunk, last_row, out);
    };
    const auto keep = [&](int i) {
      const int first = i / chunks * stride, chunk = i % chunks * kRowsAtOnce;
      const int width = std::min(stride, op.matrix.rows - first);
      const int last_row = std::min(num_rows, chunk + kRowsAtOnce);
      const float* from = results;
      for (int t = chunk / parts; t < last_row / parts; ++t, from += stride) {
        float* to = row(op.out, t) + first;
        if (op.add) add_to(to, from, width);
        else std::memcpy(to, from, size_t(width) * sizeof(float));
      }
    };
    shared(thread, phase, groups * chunks, compute, keep);
  }

  Cache cache(const Instruction& op) const {
    return {step_.kv + op.layer * step_.layer_stride, step_.num_runs};
  }

  void rope_kv(const Instruction& op, int t) {
    const Heads& h = model_.heads;
    const int dim = h.head_dim, half = model_.rotary / 2;
    const float* cos = step_.cos + step_.positions[t] * half;
    const float* sin = step_.sin + step_.positions[t] * half;
    float* q = row(op.in, t);
    float* k = q + size_t(h.num_heads) * dim;
    const float* v = k + size_t(h.num_kv_heads) * dim;
    const float scale = kLog2e / std::sqrt(float(dim));
    for (int i = 0; i < h.num_heads; ++i) {
      if (op.q_norm) rms_norm(q + i * dim, op.q_norm, op.eps, dim, q + i * dim);
      rotate(q + i * dim, cos, sin, model_.rotary, dim, scale);
    }
    const Cache to = cache(op);
    for (int i = 0; i < h.num_kv_heads; ++i) {
      if (op.k_norm) rms_norm(k + i * dim, op.k_norm, op.eps, dim, k + i * dim);
      rotate(k + i * dim, cos, sin, model_.rotary, dim, 1.0f);
      write_kv(h, to, step_.slots[t], i, k + i * dim, v + i * dim);
    }
  }

  void attend(const Instruction& op, int thread, int& phase) {
    const Attention a{model_.heads,        cache(op),      row(op.in, 0),
                      step_.widths[op.in], row(op.out, 0), sequences_.data(),
                      op.window,           engine_.partials.data(), engine_.partial_acc.data()};
    float* scratch = reinterpret_cast<float*>(aligned(engine_.scratch[size_t(thread)].data()));
    const Item* items = work_.items.data();
    const int count = int(work_.items.size());
    const auto compute = [&](int i) {
      run_item(a, items[i], i + 1 < count ? items + i + 1 : nullptr, scratch);
    };
    shared(thread, phase, count, compute, [&](int i) { keep_item(a, items[i], scratch); });
    if (!work_.merges.empty())
      shared(thread, phase, int(work_.merges.size()),
             [&](int i) { run_merge(a, work_.merges[size_t(i)], scratch); });
  }

  Engine& engine_;
  const Model& model_;
  const Step& step_;
  std::vector<Sequence> sequences_;
  Work work_;
  size_t row_scratch_ = 0;
};

}  // namespace

extern "C" {

const char* hw_instruction_set() {
#if HW_BF16
  return "avx512-vnni-bf16";
#elif HW_AVX512
  return "avx512-vnni";
#elif HW_AVX2
  return "avx2";
#else
  return "portable";
#endif
}

int32_t hw_sizeof_instruction() { return sizeof(Instruction); }
int32_t hw_sizeof_step() { return sizeof(Step); }

void* hw_create(int32_t threads) { return new Engine(threads < 1 ? 1 : threads); }
void hw_destroy(void* engine) { delete static_cast<Engine*>(engine); }

int64_t hw_strip_bytes(int32_t kind, int32_t cols) { return int64_t(strip_bytes(kind, cols)); }

// Rows of a matrix into their strips, the first one at output `row`. kQ4: Q4_1 blocks; kQ8: Q8_0
// blocks; kBF16, kF32: plain values.
void hw_pack(int32_t kind, const uint8_t* source, int32_t row, int32_t rows, int32_t cols,
             uint8_t* packed) {
  const size_t strip = strip_bytes(kind, cols), groups = size_t(cols) / kGroup;
  for (int r = 0; r < rows; ++r) {
    const int out = row + r, lane = out % kStrip;
    uint8_t* to = packed + size_t(out / kStrip) * strip;
    switch (kind) {
      case kQ4: pack_q4(source + size_t(r) * groups * 20, cols, lane, to); break;
      case kQ8: pack_q8(source + size_t(r) * groups * 34, cols, lane, to); break;
      case kBF16:
        for (int k = 0; k < cols; ++k)
          std::memcpy(to + (size_t(k) * kStrip + lane) * 2, source + (size_t(r) * cols + k) * 2, 2);
        break;
      default:
        for (int k = 0; k < cols; ++k)
          std::memcpy(to + (size_t(k) * kStrip + lane) * 4, source + (size_t(r) * cols + k) * 4, 4);
    }
  }
}

void hw_run(void* engine, const Model* model, const Step* step) {
  if (step->num_tokens < 1) return;
  Engine& e = *static_cast<Engine*>(engine);
  Run run(e, *model, *step);
  e.team.run([&](int thread) { run(thread); });
}

int32_t hw_sizeof_sample_row() { return sizeof(SampleRow); }
int32_t hw_sizeof_sample_result() { return sizeof(SampleResult); }

// A token for each of `count` rows; each names its row of `logits` [..][vocab]. `top_ids` and
// `top_values` are [count][top_stride].
void hw_sample(void* engine, const float* logits, int32_t vocab, int32_t count,
               const SampleRow* rows, SampleResult* results, int32_t top_stride, int32_t* top_ids,
               float* top_values) {
  Engine& e = *static_cast<Engine*>(engine);
  const auto one = [&](int thread, int i) {
    e.samplers[size_t(thread)].sample(logits + size_t(rows[i].row) * vocab, vocab, rows[i],
                                      results[i], top_ids + size_t(i) * top_stride,
                                      top_values + size_t(i) * top_stride);
  };
  if (count < 2) {  // waking the others takes longer than one row
    for (int i = 0; i < count; ++i) one(0, i);
    return;
  }
  e.phases.reset(1);
  e.team.run([&](int thread) { e.phases.run(thread, 0, count, [&](int i) { one(thread, i); }); });
}

}  // extern "C"
