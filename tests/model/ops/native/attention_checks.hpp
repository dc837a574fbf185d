// Checks of rope, the KV cache and paged attention: a batch of sequences, each with a history that
// is in the cache already and some queries that are computed now.
#pragma once

#include <algorithm>

#include "matrices.hpp"

namespace test {

struct Spec {
  int context, queries;  // keys at the end of the step; how many of them are new
};

struct AttentionCase {
  std::string name;
  int heads, kv_heads, dim, block_size;
  std::vector<Spec> sequences;
  int window = 0;
  int rotary = 0;  // 0: all of the head
  bool norms = false;
  float sharpness = 1.0f;
};

// Some of the new tokens of a sequence.
struct Chunk {
  int sequence, first, count;
};

constexpr uint16_t kPoison[] = {0x7f80, 0xff80, 0x7fc1, 0xffff};  // what must never be added up
constexpr int64_t kNoBlock = int64_t(1) << 40;                    // far outside of any cache
constexpr int kLayers = 2, kLayer = 1;

class World {
 public:
  World(const AttentionCase& c, uint64_t seed) : c_(c), random_(seed) {
    int64_t num_blocks = 1;
    size_t max_blocks = 0;
    int longest = 0;
    for (const Spec& s : c.sequences) {
      const int blocks = (s.context + c.block_size - 1) / c.block_size;
      num_blocks += blocks;
      max_blocks = std::max(max_blocks, size_t(blocks));
      longest = std::max(longest, s.context);
    }
    const int64_t num_runs = (num_blocks + 31) / 32;
    layout_ = {num_runs, c.kv_heads, c.dim, c.block_size};
    max_blocks_ = int(max_blocks);
    std::vector<int64_t> free;
    for (int64_t b = 0; b < num_runs * 32; ++b) free.push_back(b);
    for (size_t i = free.size(); i > 1; --i)
      std::swap(free[i - 1], free[size_t(random_.below(int(i)))]);
    tables_ = Exact<int64_t>(c.sequences.size() * max_blocks, kNoBlock);
    kv_ = Exact<uint16_t>(size_t(kLayers * layout_.size()));
    for (size_t i = 0; i < kv_.size(); ++i) kv_[i] = kPoison[random_.below(4)];
    for (size_t s = 0; s < c.sequences.size(); ++s) add_sequence(s, free);
    cos_ = Exact<float>(size_t(longest * rotary() / 2));
    sin_ = Exact<float>(cos_.size());
    for (size_t i = 0; i < cos_.size(); ++i) {
      const double angle = 6.3 * random_.uniform();
      cos_[i] = float(std::cos(angle));
      sin_[i] = float(std::sin(angle));
    }
    q_norm_ = Exact<float>(size_t(c.dim));
    k_norm_ = Exact<float>(size_t(c.dim));
    random_.fill(q_norm_);
    random_.fill(k_norm_);
  }

  // The whole step at once: everything against the naive one. Then other threads, and every
  // sequence on its own in two chunks: the same bits.
  void check(const std::vector<int>& threads) {
    std::vector<Chunk> all;
    for (int s = 0; s < int(c_.sequences.size()); ++s)
      all.push_back({s, 0, c_.sequences[size_t(s)].queries});
    verdict.in(c_.name + ", whole");
    Exact<uint16_t> kv = kv_;
    const Buffers whole = step(all, kv, threads[0]);
    check_cache(kv);
    int token = 0;
    for (const Chunk& chunk : all)
      for (int i = 0; i < chunk.count; ++i) check_token(whole, token++, chunk.sequence, i, kv);
    for (size_t t = 1; t < threads.size(); ++t) {
      verdict.in(c_.name + ", " + std::to_string(threads[t]) + " threads");
      Exact<uint16_t> again = kv_;
      const Buffers got = step(all, again, threads[t]);
      verdict.same_bits("attended", got.data[1].data(), whole.data[1].data(), whole.data[1].size());
      verdict.same_bits("cache", again.data(), kv.data(), kv.size());
    }
    token = 0;
    for (const Chunk& chunk : all) {
      check_chunks(chunk, whole.data[1].data() + size_t(token) * size_t(c_.heads * c_.dim), kv);
      token += chunk.count;
    }
  }

  Heads heads() const { return {c_.heads, c_.kv_heads, c_.dim, c_.block_size}; }

 private:
  int rotary() const { return c_.rotary ? c_.rotary : c_.dim; }
  int qkv_width() const { return (c_.heads + 2 * c_.kv_heads) * c_.dim; }
  int history(int s) const {
    return c_.sequences[size_t(s)].context - c_.sequences[size_t(s)].queries;
  }
  uint16_t* layer(Exact<uint16_t>& kv) const { return kv.data() + kLayer * layout_.size(); }
  const uint16_t* layer(const Exact<uint16_t>& kv) const {
    return kv.data() + kLayer * layout_.size();
  }

  void add_sequence(size_t s, std::vector<int64_t>& free) {
    const Spec spec = c_.sequences[s];
    std::vector<int64_t> slots;
    for (int p = 0; p < spec.context; ++p) {
      int64_t& block = tables_[s * size_t(max_blocks_) + size_t(p / c_.block_size)];
      if (block == kNoBlock) {
        block = free.back();
        free.pop_back();
      }
      slots.push_back(block * c_.block_size + p % c_.block_size);
    }
    for (int p = 0; p < spec.context - spec.queries; ++p)
      for (int h = 0; h < c_.kv_heads; ++h)
        for (int d = 0; d < c_.dim; ++d) {
          layer(kv_)[layout_.key(slots[size_t(p)], h, d)] = float_to_bf16(random_.normal());
          layer(kv_)[layout_.value(slots[size_t(p)], h, d)] = float_to_bf16(random_.normal());
        }
    Exact<float> qkv(size_t(spec.queries) * size_t(qkv_width()));
    random_.fill(qkv);
    for (int t = 0; t < spec.queries; ++t)
      for (int i = 0; i < c_.heads * c_.dim; ++i)
        qkv[size_t(t) * size_t(qkv_width()) + size_t(i)] *= c_.sharpness;
    slots_.push_back(slots);
    qkv_.push_back(qkv);
  }

  // One `hw_run`: buffer 0 is q, k, v (turned in place), buffer 1 what was attended.
  Buffers step(const std::vector<Chunk>& chunks, Exact<uint16_t>& kv, int threads) const {
    std::vector<int64_t> positions, slots, tables;
    std::vector<int32_t> starts{0}, lens;
    std::vector<float> rows;
    for (const Chunk& chunk : chunks) {
      const size_t s = size_t(chunk.sequence);
      const float* from = qkv_[s].data() + size_t(chunk.first) * size_t(qkv_width());
      rows.insert(rows.end(), from, from + size_t(chunk.count) * size_t(qkv_width()));
      for (int i = 0; i < chunk.count; ++i) {
        positions.push_back(history(chunk.sequence) + chunk.first + i);
        slots.push_back(slots_[s][size_t(positions.back())]);
      }
      starts.push_back(int32_t(positions.size()));
      lens.push_back(int32_t(positions.back() + 1));
      const int64_t* table = tables_.data() + s * size_t(max_blocks_);
      tables.insert(tables.end(), table, table + max_blocks_);
    }
    const Exact<int64_t> exact_positions(positions), exact_slots(slots), exact_tables(tables);
    const Exact<int32_t> exact_starts(starts), exact_lens(lens);
    Buffers buffers{int(positions.size()), {}, {}};
    buffers.add(qkv_width());
    buffers.add(c_.heads * c_.dim);
    buffers.data[0] = Exact<float>(rows);
    Model model{};
    model.heads = heads();
    model.rotary = rotary();
    Step made{};
    made.num_sequences = int32_t(chunks.size());
    made.max_blocks = max_blocks_;
    made.positions = exact_positions.data();
    made.slots = exact_slots.data();
    made.block_tables = exact_tables.data();
    made.query_start = exact_starts.data();
    made.seq_lens = exact_lens.data();
    made.cos = cos_.data();
    made.sin = sin_.data();
    made.kv = kv.data();
    made.num_runs = layout_.num_runs;
    made.layer_stride = layout_.size();
    Instruction rope = instruction(kRopeKV, 0, 0), attend = instruction(kAttend, 0, 1);
    rope.layer = attend.layer = kLayer;
    attend.window = c_.window;
    rope.eps = 1e-5f;
    rope.q_norm = c_.norms ? q_norm_.data() : nullptr;
    rope.k_norm = c_.norms ? k_norm_.data() : nullptr;
    run_fresh(threads, {rope, attend}, buffers, model, made);
    return buffers;
  }

  // Head `h` of the k or q that came in, as rope should leave it.
  std::vector<double> turned(int s, int query, int from, const Exact<float>& norm,
                             double scale) const {
    const float* x = qkv_[size_t(s)].data() + size_t(query) * size_t(qkv_width()) + from;
    std::vector<double> out(x, x + c_.dim);
    if (c_.norms) out = naive::rms_norm(out, norm.data(), 1e-5);
    const size_t at = size_t(history(s) + query) * size_t(rotary() / 2);
    naive::rotate(out, cos_.data() + at, sin_.data() + at, rotary(), scale);
    return out;
  }

  // New tokens are where they belong, and nothing else was touched.
  void check_cache(const Exact<uint16_t>& kv) const {
    Exact<uint16_t> expected = kv_;
    for (int s = 0; s < int(c_.sequences.size()); ++s)
      for (int i = 0; i < c_.sequences[size_t(s)].queries; ++i)
        for (int h = 0; h < c_.kv_heads; ++h) {
          const int64_t slot = slots_[size_t(s)][size_t(history(s) + i)];
          const int k_from = (c_.heads + h) * c_.dim, v_from = k_from + c_.kv_heads * c_.dim;
          const std::vector<double> k = turned(s, i, k_from, k_norm_, 1.0);
          const float* v = qkv_[size_t(s)].data() + size_t(i) * size_t(qkv_width()) + v_from;
          for (int d = 0; d < c_.dim; ++d) {
            const int64_t key = layout_.key(slot, h, d), value = layout_.value(slot, h, d);
            const double got = naive::from_bf16(layer(kv)[key]);
            // Half a step of bf16, which has 8 bits, and what float left of the rotation.
            verdict.close("key", size_t(key), got, k[size_t(d)],
                          std::fabs(k[size_t(d)]) / 256.0 + 1e-5);
            verdict.close("value", size_t(value), naive::from_bf16(layer(kv)[value]),
                          naive::to_bf16(double(v[d])), 0.0);
            layer(expected)[key] = layer(kv)[key];
            layer(expected)[value] = layer(kv)[value];
          }
        }
    verdict.same_bits("untouched cache", kv.data(), expected.data(), kv.size());
  }

  void check_token(const Buffers& got, int token, int s, int query,
                   const Exact<uint16_t>& kv) const {
    const int position = history(s) + query;
    const int lowest = c_.window ? std::max(0, position - c_.window + 1) : 0;
    const double scale = 1.4426950408889634 / std::sqrt(double(c_.dim));
    const float* q = got.data[0].data() + size_t(token) * size_t(qkv_width());
    const float* out = got.data[1].data() + size_t(token) * size_t(c_.heads * c_.dim);
    for (int h = 0; h < c_.heads; ++h) {
      const std::vector<double> expected = turned(s, query, h * c_.dim, q_norm_, scale);
      double largest = 0.0;
      for (double each : expected) largest = std::max(largest, std::fabs(each));
      for (int d = 0; d < c_.dim; ++d)
        verdict.close("query", size_t(h * c_.dim + d), double(q[h * c_.dim + d]),
                      expected[size_t(d)], 2e-6 * largest);
      const auto attended =
          naive::attend(layout_, layer(kv), h / (c_.heads / c_.kv_heads), q + h * c_.dim,
                        slots_[size_t(s)], lowest, position);
      for (int d = 0; d < c_.dim; ++d)
        verdict.close("attended", size_t(token * c_.heads + h), double(out[h * c_.dim + d]),
                      attended[size_t(d)].value, attended[size_t(d)].tolerance);
    }
  }

  void check_chunks(const Chunk& all, const float* expected, const Exact<uint16_t>& whole_kv) {
    const int cut = all.count > 1 ? 1 + random_.below(all.count - 1) : 0;
    verdict.in(c_.name + ", sequence " + std::to_string(all.sequence) + " cut at " +
               std::to_string(cut));
    Exact<uint16_t> kv = kv_;
    const Chunk chunks[] = {{all.sequence, 0, cut}, {all.sequence, cut, all.count - cut}};
    for (const Chunk& chunk : chunks) {
      if (chunk.count == 0) continue;
      const Buffers got = step({chunk}, kv, 1);
      verdict.same_bits("attended", got.data[1].data(),
                        expected + size_t(chunk.first) * size_t(c_.heads * c_.dim),
                        got.data[1].size());
    }
    for (int64_t slot : slots_[size_t(all.sequence)])
      for (int h = 0; h < c_.kv_heads; ++h)
        for (int d = 0; d < c_.dim; ++d)
          for (int64_t at : {layout_.key(slot, h, d), layout_.value(slot, h, d)})
            verdict.same_bits("cache", layer(kv) + at, layer(whole_kv) + at, 1);
  }

  AttentionCase c_;
  Random random_;
  naive::Layout layout_{};
  int max_blocks_ = 0;
  Exact<int64_t> tables_;                    // [sequences][max_blocks]
  std::vector<std::vector<int64_t>> slots_;  // of each sequence, by position
  std::vector<Exact<float>> qkv_;            // of each sequence, its new tokens
  Exact<uint16_t> kv_;                       // before the step
  Exact<float> cos_, sin_, q_norm_, k_norm_;
};

}  // namespace test
