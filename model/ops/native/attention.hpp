// Paged attention: one code path for decodes and prefill chunks.
//
// K and V are bf16 in tiles of 16 tokens, aligned to absolute positions, each tile for one KV head.
// What one head has in a run of 32 blocks lies together, so that blocks which follow each other are
// read in one direction, as the processor's own prefetching likes it.
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
#include <type_traits>
#include <utility>
#include <vector>

#include "rows.hpp"

namespace hw {

constexpr int kTile = 16, kPairs = kTile / 2;
constexpr int kRun = 32, kStep = 64, kSpan = 512, kMaxItemRows = 24;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Heads {
  int num_heads, num_kv_heads, head_dim, block_size;
  int group() const { return num_heads / num_kv_heads; }
};

// The cache of one layer: [2][num_runs][num_kv_heads][32 blocks][block_size / 16][16 * head_dim].
struct Cache {
  uint16_t* base;
  int64_t num_runs;

  uint16_t* tile(const Heads& h, int is_value, int64_t block, int head, int tile) const {
    const int64_t tiles = h.block_size / kTile;
    const int64_t run = (is_value * num_runs + block / kRun) * h.num_kv_heads + head;
    return base + ((run * kRun + block % kRun) * tiles + tile) * kTile * h.head_dim;
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
    if (seq.num_queries <= per_item && spans > 1) {
      // The heads of a span lie beside each other: whoever reads one soon reads the next.
      const int rows = seq.num_queries * group, begin = work.num_partials;
      for (int span = 0; span < spans; ++span)
        for (int head = 0; head < h.num_kv_heads; ++head)
          work.items.push_back(
              {s, head, 0, seq.num_queries, span, begin + (head * spans + span) * rows});
      for (int head = 0; head < h.num_kv_heads; ++head)
        work.merges.push_back({s, head, 0, seq.num_queries, spans, begin + head * spans * rows});
      work.num_partials += h.num_kv_heads * spans * rows;
      continue;
    }
    for (int head = 0; head < h.num_kv_heads; ++head) {
      // The last queries have most keys: first, so that no thread ends with them.
      for (int first = (seq.num_queries - 1) / per_item * per_item; first >= 0; first -= per_item) {
        const int count = std::min(per_item, seq.num_queries - first);
        work.items.push_back({s, head, first, count, -1, 0});
      }
    }
  }
  return work;
}

// ---------------------------------------------------------------------------------- the kernel

// Queries and probabilities as they are multiplied: in bf16 where the CPU multiplies pairs of bf16
// and adds them up in fp32, else in fp32.
#if HW_BF16
using Factor = uint16_t;
constexpr int kRowsTogether = 6;
#else
using Factor = float;
constexpr int kRowsTogether = 4;
#endif

// How many columns, each as wide as a register, share the factors of so many rows: as many as there
// are registers for their sums, so that no sum waits for the one before.
constexpr int columns_together([[maybe_unused]] int rows) {
#if HW_AVX512
  return 4;
#elif HW_AVX2
  return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2;
#else
  return 1;
#endif
}

// Up to 64 keys, as tiles.
struct KeyStep {
  int count = 0;
  const uint16_t *keys[kStep / kTile], *values[kStep / kTile];
};

// Tiles on their way from memory, asked for a few lines at a time between everything else: a core
// that asks for more lines at once than it can wait for stands still.
class Fetch {
 public:
  static constexpr int kLine = 64;

  Fetch(const KeyStep& step, int head_dim) : lines_a_tile_(kTile * head_dim * 2 / kLine) {
    for (int t = 0; t < step.count; ++t) {
      tiles_[t] = reinterpret_cast<const char*>(step.keys[t]);
      tiles_[step.count + t] = reinterpret_cast<const char*>(step.values[t]);
    }
    left_ = 2 * step.count * lines_a_tile_;
  }

  int left() const { return left_; }

  // Where the next lines are, all of them in one tile; if there are none, where asking costs little.
  const char* next(int number) {
    if (line_ + number > lines_a_tile_) left_ -= lines_a_tile_ - line_, ++tile_, line_ = 0;
    if (left_ < number) return tiles_[0];
    const char* here = tiles_[tile_] + line_ * kLine;
    left_ -= number, line_ += number;
    return here;
  }

  void lines(int number) {
    for (; number > 0 && left_ > 0; number -= kPairs) {
      const char* here = next(kPairs);
      for (int i = 0; i < kPairs; ++i) __builtin_prefetch(here + i * kLine);
    }
  }

 private:
  const char* tiles_[2 * kStep / kTile] = {reinterpret_cast<const char*>(this)};
  const int lines_a_tile_;
  int left_, tile_ = 0, line_ = 0;
};

// f(0), f(1), ... f(N - 1), each number a constant, so that what they number may be in registers.
#define HW_INLINE __attribute__((always_inline))
template <class F, int... I>
HW_INLINE inline void each_of(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
HW_INLINE inline void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>());
}

// sum[r][j] += rows[r] * columns[j], pair by pair, in order. A column has its pairs `stride` elements
// apart. With each pair a line of what will be wanted is asked for, from `ask` on.
template <int R, int N>
HW_INLINE inline void add_products(const Factor* const* rows, const uint16_t* const* columns,
                                   int num_pairs, int stride, const char* ask, Lanes (&sum)[R][N]) {
#pragma GCC unroll 1
  for (int pair = 0; pair < num_pairs; ++pair) {
    __builtin_prefetch(ask + pair * Fetch::kLine);
    const size_t at = size_t(pair) * stride;
#if HW_BF16
    __m512bh column[N];
    each<N>([&](auto j) HW_INLINE { column[j] = (__m512bh)_mm512_loadu_si512(columns[j] + at); });
    each<R>([&](auto r) HW_INLINE {
      int32_t two;
      std::memcpy(&two, rows[r] + 2 * pair, 4);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(two);
      each<N>([&](auto j) HW_INLINE {
        sum[r][j].v = _mm512_dpbf16_ps(sum[r][j].v, factor, column[j]);
      });
    });
#else
    Lanes factor[R];
    each<R>([&](auto r) HW_INLINE { factor[r] = splat_lanes(rows[r][2 * pair]); });
    each<N>([&](auto j) HW_INLINE {
      const Lanes column = first_of_pairs(columns[j] + at);
      each<R>([&](auto r) HW_INLINE { sum[r][j] = fma(column, factor[r], sum[r][j]); });
    });
    each<R>([&](auto r) HW_INLINE { factor[r] = splat_lanes(rows[r][2 * pair + 1]); });
    each<N>([&](auto j) HW_INLINE {
      const Lanes column = second_of_pairs(columns[j] + at);
      each<R>([&](auto r) HW_INLINE { sum[r][j] = fma(column, factor[r], sum[r][j]); });
    });
#endif
  }
}

// Scores of the columns `first` and on: kLanes keys each. A function of its own, as the next one is,
// so that the compiler has all registers for its loop.
template <int R, int N>
__attribute__((noinline)) void score_columns(const KeyStep& tiles, int first, Fetch& fetch,
                                             const Factor* const* q, int head_dim, float* scores) {
  Lanes sum[R][N] = {};
  const uint16_t* columns[N];
  for (int j = 0; j < N; ++j) {
    const int key = (first + j) * kLanes;
    columns[j] = tiles.keys[key / kTile] + key % kTile * 2;
  }
  const int num_pairs = head_dim / 2;
  add_products<R, N>(q, columns, num_pairs, 2 * kTile, fetch.next(num_pairs), sum);
  each<R>([&](auto r) HW_INLINE {
    each<N>([&](auto j) HW_INLINE { store(scores + r * kStep + (first + j) * kLanes, sum[r][j]); });
  });
}

// acc += p * V for the columns `first` and on: kLanes dimensions each.
template <int R, int N>
__attribute__((noinline)) void add_value_columns(const KeyStep& tiles, int first, Fetch& fetch,
                                                 const Factor* p, int head_dim, float* const* acc) {
  Lanes sum[R][N];
  each<R>([&](auto r) HW_INLINE {
    each<N>([&](auto j) HW_INLINE { sum[r][j] = load_lanes(acc[r] + (first + j) * kLanes); });
  });
  for (int t = 0; t < tiles.count; ++t) {
    const Factor* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = p + r * kStep + t * kTile;
    const uint16_t* columns[N];
    for (int j = 0; j < N; ++j) columns[j] = tiles.values[t] + (first + j) * kLanes * 2;
    add_products<R, N>(rows, columns, kPairs, 2 * head_dim, fetch.next(kPairs), sum);
  }
  each<R>([&](auto r) HW_INLINE {
    each<N>([&](auto j) HW_INLINE { store(acc[r] + (first + j) * kLanes, sum[r][j]); });
  });
}

template <int R, int N = columns_together(R)>
inline void score(const KeyStep& tiles, Fetch& fetch, const Factor* const* q, int head_dim,
                  float* scores, int first = 0) {
  const int num_columns = tiles.count * kTile / kLanes;
  for (; first + N <= num_columns; first += N)
    score_columns<R, N>(tiles, first, fetch, q, head_dim, scores);
  if constexpr (N > 1)
    if (first < num_columns) score<R, (N + 1) / 2>(tiles, fetch, q, head_dim, scores, first);
}

template <int R, int N = columns_together(R)>
inline void add_values(const KeyStep& tiles, Fetch& fetch, const Factor* p, int head_dim,
                       float* const* acc, int first = 0) {
  const int num_columns = head_dim / kLanes;
  for (; first + N <= num_columns; first += N)
    add_value_columns<R, N>(tiles, first, fetch, p, head_dim, acc);
  if constexpr (N > 1)
    if (first < num_columns) add_values<R, (N + 1) / 2>(tiles, fetch, p, head_dim, acc, first);
}

// Rows of one item: a query's position, its vector, its running result.
struct Rows {
  int count;
  int position[kMaxItemRows];
  int lowest[kMaxItemRows];  // the first key it may see
  const Factor* q[kMaxItemRows];
  Partial result[kMaxItemRows];
  float* acc[kMaxItemRows];
};

// What a thread needs to attend: [row][64] scores and probabilities, [row][head_dim] queries, one
// tile of values, and the sums of a span; and for each row of an item what comes of it.
struct Scratch {
  float* scores;
  Factor* p;
  Factor* q;
  uint16_t* tail;
  float *span_acc, *result_acc;
  Partial* results;

  Scratch(float* base, const Heads& h) : scores(base) {
    const size_t rows = kMaxItemRows, dim = size_t(h.head_dim);
    span_acc = scores + rows * kStep;
    result_acc = span_acc + rows * dim;
    results = reinterpret_cast<Partial*>(result_acc + item_rows(h) * dim);
    tail = reinterpret_cast<uint16_t*>(results + item_rows(h));
    q = reinterpret_cast<Factor*>(tail + kTile * dim);
#if HW_BF16
    p = q + rows * dim;
#else
    p = scores;  // in place
#endif
  }

  // in floats
  static size_t size(const Heads& h) {
    const size_t rows = kMaxItemRows, dim = size_t(h.head_dim);
    return rows * 2 * (kStep + dim) + item_rows(h) * (dim + 2) + kTile * dim / 2;
  }

 private:
  static size_t item_rows(const Heads& h) { return size_t(std::max(kMaxItemRows, h.group())); }
};

// Sixteen probabilities.
inline void put_factors(F16 values, Factor* to) {
#if HW_BF16
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values.v));
#else
  store(to, values);
#endif
}

// The query as the products want it: itself, or a copy.
inline const Factor* factors(const float* query, int head_dim, Factor* to) {
#if HW_BF16
  for (int d = 0; d < head_dim; d += 16) put_factors(load(query + d), to + d);
  return to;
#else
  (void)head_dim, (void)to;
  return query;
#endif
}

inline void mask_scores(float* scores, int first_key, int num_keys, int lowest, int position) {
  for (int i = 0; i < num_keys; ++i)
    if (first_key + i > position || first_key + i < lowest) scores[i] = kNothing;
}

// Scores of one row -> probabilities, with the row's maximum, sum and values so far brought along.
inline void soften(float* scores, int num_tiles, int head_dim, Partial& result, float* acc,
                   Factor* p) {
  F16 largest = load(scores);
  for (int t = 1; t < num_tiles; ++t) largest = max(largest, load(scores + t * kTile));
  const float top = std::max(result.max, max_lanes(largest));
  if (top == kNothing) {  // nothing to see here, for this row: exactly nothing happens
    for (int t = 0; t < num_tiles; ++t) put_factors(zero(), p + t * kTile);
    return;
  }
  F16 sum = zero();
  for (int t = 0; t < num_tiles; ++t) {
    const F16 probability = exp2(add(load(scores + t * kTile), splat(-top)));
    put_factors(probability, p + t * kTile);
    sum = add(sum, probability);
  }
  if (top != result.max) {
    float shrink[16];
    store(shrink, exp2(splat(result.max - top)));
    result.sum *= shrink[0];
    for (int d = 0; d < head_dim; d += 16) store(acc + d, mul(load(acc + d), splat(shrink[0])));
    result.max = top;
  }
  result.sum += sum_lanes(sum);
}

// The tiles of the keys [first, last); none where first >= last.
inline KeyStep tiles_of(const Heads& h, const Cache& cache, const Sequence& seq, int head, int first,
                        int last) {
  KeyStep step;
  step.count = first < last ? (std::min(kStep, last - first) + kTile - 1) / kTile : 0;
  const int tiles_per_block = h.block_size / kTile;
  for (int t = 0; t < step.count; ++t) {
    const int tile = first / kTile + t;
    const int64_t block = seq.block_table[tile / tiles_per_block];
    step.keys[t] = cache.tile(h, 0, block, head, tile % tiles_per_block);
    step.values[t] = cache.tile(h, 1, block, head, tile % tiles_per_block);
  }
  return step;
}

// The keys [first, last) of one span, `first` a multiple of 64; `after` will be wanted next.
inline void attend_span(const Heads& h, const Cache& cache, const Sequence& seq, int head,
                        int first, int last, const KeyStep& after, Rows& rows,
                        const Scratch& own) {
  int lowest = rows.lowest[0];
  for (int r = 1; r < rows.count; ++r) lowest = std::min(lowest, rows.lowest[r]);
  if (lowest > first) first += (lowest - first) / kStep * kStep;
  const int dim = h.head_dim;
  KeyStep tiles = tiles_of(h, cache, seq, head, first, last), following;
  for (int key = first; key < last; key += kStep, tiles = following) {
    const int then = key + kStep;
    following = then < last ? tiles_of(h, cache, seq, head, then, last) : after;
    const int end = tiles.count * kTile;
    if (key + end > last) {
      // Behind the last key lies what an earlier owner of the block left, or nothing yet. Its
      // probability is zero, but zero times infinity is not: use a copy with zeros there.
      const int kept = last - (key + end - kTile);
      std::memcpy(own.tail, tiles.values[tiles.count - 1], size_t(kTile) * dim * 2);
      for (int lane = kept; lane < kTile; ++lane)
        for (int d = 0; d < dim; ++d) own.tail[((lane / 2) * dim + d) * 2 + lane % 2] = 0;
      tiles.values[tiles.count - 1] = own.tail;
    }
    Fetch fetch(following, dim);
    for (int r = 0; r < rows.count;) {
      const int left = rows.count - r;
      int width = std::min(left, kRowsTogether);
      // There is no kernel for five, and the rest of seven or eight would be too narrow.
      if (left == 5 || left == 7 || left == 8) width = 4;
      float* scores = own.scores + r * kStep;
      Factor* p = own.p + r * kStep;
      const auto q = rows.q + r;
      const int before = fetch.left();
      switch (width) {
#if HW_BF16
        case 6: score<6>(tiles, fetch, q, dim, scores); break;
#endif
        case 4: score<4>(tiles, fetch, q, dim, scores); break;
        case 3: score<3>(tiles, fetch, q, dim, scores); break;
        case 2: score<2>(tiles, fetch, q, dim, scores); break;
        default: score<1>(tiles, fetch, q, dim, scores);
      }
      // What the products will not have asked for, the softmax asks for.
      const int rest = fetch.left() - (before - fetch.left());
      for (int i = r; i < r + width; ++i) {
        float* row = own.scores + i * kStep;
        if (key + end - 1 > rows.position[i] || key < rows.lowest[i])
          mask_scores(row, key, end, rows.lowest[i], rows.position[i]);
        fetch.lines(rest / width);
        soften(row, tiles.count, dim, rows.result[i], rows.acc[i], own.p + i * kStep);
      }
      switch (width) {
#if HW_BF16
        case 6: add_values<6>(tiles, fetch, p, dim, rows.acc + r); break;
#endif
        case 4: add_values<4>(tiles, fetch, p, dim, rows.acc + r); break;
        case 3: add_values<3>(tiles, fetch, p, dim, rows.acc + r); break;
        case 2: add_values<2>(tiles, fetch, p, dim, rows.acc + r); break;
        default: add_values<1>(tiles, fetch, p, dim, rows.acc + r);
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

// Where row `r` of an item goes: the query heads of the first query, then those of the next.
inline float* attended(const Attention& a, const Item& item, const Sequence& seq, int r) {
  const int group = a.heads.group(), token = seq.query_start + item.first + r / group;
  const int head = item.head * group + r % group;
  return a.out + (size_t(token) * a.heads.num_heads + head) * a.heads.head_dim;
}

// Where an item begins.
inline KeyStep first_tiles(const Attention& a, const Item* item) {
  if (!item) return KeyStep{};
  const Sequence& seq = a.sequences[item->sequence];
  return tiles_of(a.heads, a.cache, seq, item->head, std::max(0, item->span) * kSpan, seq.seq_len);
}

// Into the results of `scratch`. `next` is the item that this thread will probably be given next, or
// null.
inline void run_item(const Attention& a, const Item& item, const Item* next, float* scratch) {
  const Heads& h = a.heads;
  const Sequence& seq = a.sequences[item.sequence];
  const int group = h.group(), dim = h.head_dim;
  const Scratch own(scratch, h);
  // A wide group (more than 24 query heads on one KV head) goes in several passes.
  for (int from = 0; from < item.count * group; from += kMaxItemRows) {
    Rows rows;
    rows.count = std::min(kMaxItemRows, item.count * group - from);
    Partial* total = own.results + from;
    float* total_acc = own.result_acc + size_t(from) * dim;
    int last = 0;
    for (int r = 0; r < rows.count; ++r) {
      const int query = item.first + (from + r) / group, lane = (from + r) % group;
      const int position = seq.seq_len - seq.num_queries + query;
      rows.position[r] = position;
      rows.lowest[r] = a.window ? std::max(0, position - a.window + 1) : 0;
      const float* q =
          a.q + size_t(seq.query_start + query) * a.q_stride + (item.head * group + lane) * dim;
      rows.q[r] = factors(q, dim, own.q + r * dim);
      last = std::max(last, position + 1);
      total[r] = {kNothing, 0.0f};
    }
    const int begin = item.span < 0 ? 0 : item.span;
    const int end = item.span < 0 ? num_spans(last) : item.span + 1;
    for (int span = begin; span < end; ++span) {
      for (int r = 0; r < rows.count; ++r) {
        rows.result[r] = {kNothing, 0.0f};
        rows.acc[r] = (item.span < 0 ? own.span_acc : total_acc) + r * dim;
        std::memset(rows.acc[r], 0, size_t(dim) * 4);
      }
      const int behind = (span + 1) * kSpan;
      const KeyStep after = behind < last ? tiles_of(h, a.cache, seq, item.head, behind, last)
                                          : first_tiles(a, next);
      attend_span(h, a.cache, seq, item.head, span * kSpan, std::min(last, behind), after, rows,
                  own);
      for (int r = 0; r < rows.count; ++r) {
        if (item.span < 0) merge(total[r], total_acc + r * dim, rows.result[r], rows.acc[r], dim);
        else total[r] = rows.result[r];
      }
    }
  }
}

// What `run_item` left, to where it belongs.
inline void keep_item(const Attention& a, const Item& item, float* scratch) {
  const Heads& h = a.heads;
  const int group = h.group(), dim = h.head_dim, rows = item.count * group;
  const Scratch own(scratch, h);
  if (item.span >= 0) {
    std::copy(own.results, own.results + rows, a.partials + item.partial);
    std::copy(own.result_acc, own.result_acc + size_t(rows) * dim,
              a.partial_acc + size_t(item.partial) * dim);
    return;
  }
  const Sequence& seq = a.sequences[item.sequence];
  for (int r = 0; r < rows; ++r)
    put_attended(own.results[r], own.result_acc + size_t(r) * dim, dim, attended(a, item, seq, r));
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
    put_attended(total, scratch, dim, attended(a, item, seq, r));
  }
}

}  // namespace hw
