// Paged attention: one code path for decodes and prefill chunks.
//
// K and V are bf16 in tiles of 16 tokens, aligned to absolute positions, each tile for one KV head:
//
//   K tile  [head_dim / 2][16 tokens][2]   sixteen keys per load; two dimensions beside each other
//   V tile  [8 pairs of tokens][head_dim][2]   sixteen dimensions per load; two tokens beside each
//
// A query goes through its keys in steps of 64, aligned to absolute positions, with an online
// softmax (Milakov and Gimelshein 2018), and starts anew at each span of 512 keys; the spans' results
// are merged in order. So the sums of a query depend on its position alone: not on the chunk it came
// in, nor on who computed which span. A masked key has probability zero and adds exactly nothing.
//
// The query heads that share a KV head are rows of one item, and share every load of K and V.
#pragma once

#include <limits>
#include <vector>

#include "rows.hpp"

namespace hw {

constexpr int kTile = 16, kStep = 64, kSpan = 512, kMaxItemRows = 24;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Heads {
  int num_heads, num_kv_heads, head_dim, block_size;
  int group() const { return num_heads / num_kv_heads; }
};

// The cache of one layer: [2][num_blocks][num_kv_heads][block_size / 16][16 * head_dim].
struct Cache {
  uint16_t* base;
  int64_t num_blocks;

  uint16_t* tile(const Heads& h, int is_value, int64_t block, int head, int tile) const {
    const int64_t tiles = h.block_size / kTile;
    return base + ((((is_value * num_blocks + block) * h.num_kv_heads + head) * tiles + tile) *
                   kTile * h.head_dim);
  }
};

// Rotate dimensions i and i + rotary / 2 (both halves of the part that turns), then scale.
inline void rotate(float* x, const float* cos, const float* sin, int rotary, int head_dim,
                   float scale) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    const float left = a * cos[i], right = b * cos[i];
    x[i] = (left - b * sin[i]) * scale;
    x[i + half] = (right + a * sin[i]) * scale;
  }
  for (int i = rotary; i < head_dim; ++i) x[i] *= scale;
}

inline void write_kv(const Heads& h, const Cache& cache, int64_t slot, int head, const float* k,
                     const float* v) {
  const int64_t block = slot / h.block_size;
  const int offset = int(slot % h.block_size), lane = offset % kTile;
  uint16_t* keys = cache.tile(h, 0, block, head, offset / kTile) + lane * 2;
  uint16_t* values =
      cache.tile(h, 1, block, head, offset / kTile) + (lane / 2) * 2 * h.head_dim + lane % 2;
  for (int d = 0; d < h.head_dim; ++d) {
    keys[(d / 2) * 2 * kTile + d % 2] = float_to_bf16(k[d]);
    values[d * 2] = float_to_bf16(v[d]);
  }
}

struct Sequence {
  int query_start, num_queries, seq_len;
  const int64_t* block_table;
};

// Queries [first, first + count) of a sequence for one KV head, over one span or over all of them.
struct Item {
  int sequence, head, first, count;
  int span;     // -1: all spans, result to the output
  int partial;  // else: where the span's result goes
};

// Result of a span (or of several) for one row: the maximum, the sum, the weighted values.
struct Partial {
  float max, sum;
};

struct Work {
  std::vector<Item> items;     // attention
  std::vector<Item> merges;    // sequences whose spans were computed apart; `partial` is the first
  int num_partials = 0;        // rows of partial results
};

inline int num_spans(int seq_len) { return (seq_len + kSpan - 1) / kSpan; }

inline Work plan(const Heads& h, const Sequence* sequences, int num_sequences) {
  Work work;
  const int group = h.group();
  const int per_item = std::max(1, kMaxItemRows / group);
  for (int s = 0; s < num_sequences; ++s) {
    const Sequence& seq = sequences[s];
    const int spans = num_spans(seq.seq_len);
    for (int head = 0; head < h.num_kv_heads; ++head) {
      if (seq.num_queries <= per_item && spans > 1) {
        work.merges.push_back({s, head, 0, seq.num_queries, spans, work.num_partials});
        for (int span = 0; span < spans; ++span) {
          work.items.push_back({s, head, 0, seq.num_queries, span, work.num_partials});
          work.num_partials += seq.num_queries * group;
        }
      } else {  // the last queries have most keys: first, so that no thread ends with them
        for (int first = (seq.num_queries - 1) / per_item * per_item; first >= 0;
             first -= per_item) {
          const int count = std::min(per_item, seq.num_queries - first);
          work.items.push_back({s, head, first, count, -1, 0});
        }
      }
    }
  }
  return work;
}

// ---------------------------------------------------------------------------------- the kernel

template <int R>
inline void score_tile(const uint16_t* keys, const float* const* q, int head_dim, float* scores,
                       int stride) {
  F16 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = zero();
  for (int d = 0; d < head_dim; d += 2) {
    F16 first, second;
    load_bf16_pairs(keys + d * kTile, first, second);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r] = fma(first, splat(q[r][d]), sum[r]);
      sum[r] = fma(second, splat(q[r][d + 1]), sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) store(scores + r * stride, sum[r]);
}

// acc += p * V over `num_tiles` tiles of 16 keys; 16 dimensions at a time.
template <int R>
inline void add_values(const uint16_t* const* values, int num_tiles, const float* p, int stride,
                       int head_dim, float* const* acc) {
  for (int d = 0; d < head_dim; d += 16) {
    F16 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(acc[r] + d);
    for (int t = 0; t < num_tiles; ++t) {
#pragma GCC unroll 2
      for (int pair = 0; pair < kTile / 2; ++pair) {
        F16 first, second;
        load_bf16_pairs(values[t] + (pair * head_dim + d) * 2, first, second);
        const float* weight = p + t * kTile + pair * 2;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r] = fma(first, splat(weight[r * stride]), sum[r]);
          sum[r] = fma(second, splat(weight[r * stride + 1]), sum[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) store(acc[r] + d, sum[r]);
  }
}

// Rows of one item: a query's position, its vector, its running result.
struct Rows {
  int count;
  int position[kMaxItemRows];
  int lowest[kMaxItemRows];  // the first key it may see
  const float* q[kMaxItemRows];
  Partial result[kMaxItemRows];
  float* acc[kMaxItemRows];
};

inline void mask_scores(float* scores, int first_key, int num_keys, int lowest, int position) {
  for (int i = 0; i < num_keys; ++i)
    if (first_key + i > position || first_key + i < lowest) scores[i] = kNothing;
}

// The keys [first, last) of one span, `first` a multiple of 64.
inline void attend_span(const Heads& h, const Cache& cache, const Sequence& seq, int head,
                        int first, int last, Rows& rows, float* scores) {
  int lowest = rows.lowest[0];
  for (int r = 1; r < rows.count; ++r) lowest = std::min(lowest, rows.lowest[r]);
  const int tiles_per_block = h.block_size / kTile;
  for (int key = first; key < last; key += kStep) {
    if (key + kStep <= lowest) continue;
    const int num_tiles = (std::min(kStep, last - key) + kTile - 1) / kTile;
    const uint16_t *keys[kStep / kTile], *values[kStep / kTile];
    uint16_t* spare = reinterpret_cast<uint16_t*>(scores + kMaxItemRows * kStep);
    for (int t = 0; t < num_tiles; ++t) {
      const int tile = key / kTile + t;
      const int64_t block = seq.block_table[tile / tiles_per_block];
      keys[t] = cache.tile(h, 0, block, head, tile % tiles_per_block);
      values[t] = cache.tile(h, 1, block, head, tile % tiles_per_block);
    }
    if (key + num_tiles * kTile > last) {
      // Behind the last key lies what an earlier owner of the block left, or nothing yet. Its
      // probability is zero, but zero times infinity is not: use a copy with zeros there.
      const uint16_t* tail = values[num_tiles - 1];
      const int kept = last - (key + (num_tiles - 1) * kTile);
      std::memcpy(spare, tail, size_t(kTile) * h.head_dim * 2);
      for (int lane = kept; lane < kTile; ++lane)
        for (int d = 0; d < h.head_dim; ++d)
          spare[((lane / 2) * h.head_dim + d) * 2 + lane % 2] = 0;
      values[num_tiles - 1] = spare;
    }
    for (int r = 0; r < rows.count;) {
      const int left = rows.count - r;
      const int width = left >= 4 ? 4 : left;
      for (int t = 0; t < num_tiles; ++t) {
        float* to = scores + r * kStep + t * kTile;
        switch (width) {
          case 4: score_tile<4>(keys[t], rows.q + r, h.head_dim, to, kStep); break;
          case 3: score_tile<3>(keys[t], rows.q + r, h.head_dim, to, kStep); break;
          case 2: score_tile<2>(keys[t], rows.q + r, h.head_dim, to, kStep); break;
          default: score_tile<1>(keys[t], rows.q + r, h.head_dim, to, kStep);
        }
      }
      for (int i = r; i < r + width; ++i) {
        float* row = scores + i * kStep;
        const int end = num_tiles * kTile;
        if (key + end - 1 > rows.position[i] || key < rows.lowest[i])
          mask_scores(row, key, end, rows.lowest[i], rows.position[i]);
        F16 largest = load(row);
        for (int t = 1; t < num_tiles; ++t) largest = max(largest, load(row + t * kTile));
        Partial& result = rows.result[i];
        const float top = std::max(result.max, max_lanes(largest));
        if (top == kNothing) {  // nothing to see here, for this row: exactly nothing happens
          for (int t = 0; t < num_tiles; ++t) store(row + t * kTile, zero());
          continue;
        }
        F16 sum = zero();
        for (int t = 0; t < num_tiles; ++t) {
          const F16 p = exp2(add(load(row + t * kTile), splat(-top)));
          store(row + t * kTile, p);
          sum = add(sum, p);
        }
        if (top != result.max) {
          float shrink[16];
          store(shrink, exp2(splat(result.max - top)));
          result.sum *= shrink[0];
          for (int d = 0; d < h.head_dim; d += 16)
            store(rows.acc[i] + d, mul(load(rows.acc[i] + d), splat(shrink[0])));
          result.max = top;
        }
        result.sum += sum_lanes(sum);
      }
      const float* p = scores + r * kStep;
      switch (width) {
        case 4: add_values<4>(values, num_tiles, p, kStep, h.head_dim, rows.acc + r); break;
        case 3: add_values<3>(values, num_tiles, p, kStep, h.head_dim, rows.acc + r); break;
        case 2: add_values<2>(values, num_tiles, p, kStep, h.head_dim, rows.acc + r); break;
        default: add_values<1>(values, num_tiles, p, kStep, h.head_dim, rows.acc + r);
      }
      r += width;
    }
  }
}

// total = total and part, in this order.
inline void merge(Partial& total, float* acc, const Partial& part, const float* part_acc,
                  int head_dim) {
  if (part.max == kNothing) return;
  if (total.max == kNothing) {
    total = part;
    std::memcpy(acc, part_acc, size_t(head_dim) * 4);
    return;
  }
  const float top = std::max(total.max, part.max);
  float a[16], b[16];
  store(a, exp2(splat(total.max - top)));
  store(b, exp2(splat(part.max - top)));
  for (int d = 0; d < head_dim; d += 16)
    store(acc + d, fma(load(acc + d), splat(a[0]), mul(load(part_acc + d), splat(b[0]))));
  total = {top, total.sum * a[0] + part.sum * b[0]};
}

inline void put_attended(const Partial& result, const float* acc, int head_dim, float* out) {
  const F16 scale = splat(1.0f / result.sum);
  for (int d = 0; d < head_dim; d += 16) store(out + d, mul(load(acc + d), scale));
}

// Scratch of one thread, in floats: scores, a tile of values, accumulators of a span and of all.
inline size_t attention_scratch(int head_dim) {
  return size_t(kMaxItemRows) * (kStep + 2 * size_t(head_dim)) + size_t(kTile) * head_dim / 2;
}

struct Attention {
  Heads heads;
  Cache cache;
  const float* q;  // [tokens][q_stride], rotated and scaled by log2(e) / sqrt(head_dim)
  int q_stride;
  float* out;  // [tokens][num_heads * head_dim]
  const Sequence* sequences;
  int window;  // 0: none
  Partial* partials;
  float* partial_acc;  // [num_partials][head_dim]
};

inline void run_item(const Attention& a, const Item& item, float* scratch) {
  const Heads& h = a.heads;
  const Sequence& seq = a.sequences[item.sequence];
  const int group = h.group(), dim = h.head_dim;
  float* scores = scratch;
  float* span_acc = scores + kMaxItemRows * kStep + kTile * dim / 2;
  float* total_acc = span_acc + kMaxItemRows * dim;
  // A wide group (more than 24 query heads on one KV head) goes in several passes.
  for (int from = 0; from < item.count * group; from += kMaxItemRows) {
    Rows rows;
    rows.count = std::min(kMaxItemRows, item.count * group - from);
    Partial total[kMaxItemRows];
    int last = 0;
    for (int r = 0; r < rows.count; ++r) {
      const int query = item.first + (from + r) / group, lane = (from + r) % group;
      const int position = seq.seq_len - seq.num_queries + query;
      rows.position[r] = position;
      rows.lowest[r] = a.window ? std::max(0, position - a.window + 1) : 0;
      rows.q[r] = a.q + size_t(seq.query_start + query) * a.q_stride + (item.head * group + lane) * dim;
      last = std::max(last, position + 1);
      total[r] = {kNothing, 0.0f};
    }
    const int begin = item.span < 0 ? 0 : item.span;
    const int end = item.span < 0 ? num_spans(last) : item.span + 1;
    for (int span = begin; span < end; ++span) {
      for (int r = 0; r < rows.count; ++r) {
        rows.result[r] = {kNothing, 0.0f};
        rows.acc[r] = item.span < 0 ? span_acc + r * dim
                                    : a.partial_acc + size_t(item.partial + from + r) * dim;
        std::memset(rows.acc[r], 0, size_t(dim) * 4);
      }
      attend_span(h, a.cache, seq, item.head, span * kSpan, std::min(last, (span + 1) * kSpan),
                  rows, scores);
      for (int r = 0; r < rows.count; ++r) {
        if (item.span < 0) merge(total[r], total_acc + r * dim, rows.result[r], rows.acc[r], dim);
        else a.partials[item.partial + from + r] = rows.result[r];
      }
    }
    if (item.span >= 0) continue;
    for (int r = 0; r < rows.count; ++r) {
      const int query = item.first + (from + r) / group, lane = (from + r) % group;
      put_attended(total[r], total_acc + r * dim, dim,
                   a.out + (size_t(seq.query_start + query) * h.num_heads + item.head * group + lane) * dim);
    }
  }
}

inline void run_merge(const Attention& a, const Item& item, float* scratch) {
  const Heads& h = a.heads;
  const int group = h.group(), dim = h.head_dim, rows = item.count * group;
  const Sequence& seq = a.sequences[item.sequence];
  for (int r = 0; r < rows; ++r) {
    Partial total = {kNothing, 0.0f};
    for (int span = 0; span < item.span; ++span) {
      const size_t at = size_t(item.partial) + size_t(span) * rows + r;
      merge(total, scratch, a.partials[at], a.partial_acc + at * dim, dim);
    }
    put_attended(total, scratch, dim,
                 a.out + (size_t(seq.query_start + r / group) * h.num_heads + item.head * group + r % group) * dim);
  }
}

}  // namespace hw
