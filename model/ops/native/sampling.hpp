// Logits to tokens: what model/sampling/sampler.py does with torch, a row at a time on one thread.
//
// The vocabulary is read in blocks of 256. Their highest logits tell where the 64 highest of all
// are and which blocks weigh nothing, so that most of a row is read once or twice and never sorted.
// All sums run in one order that depends on the row alone.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "simd.hpp"

namespace hw {

constexpr int kBlock = 256;  // BLOCK in logprobs.py
constexpr int kTop = 64;     // _TOP in sampler.py
constexpr size_t kBuckets = 4096;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a row asks for. Mirrored field for field in sampling/native.py.
struct SampleRow {
  double draw, top_p, min_p, presence;
  const int64_t* token_ids;  // [num_counted] distinct, and how often each is in the output
  const float* counts;
  const int64_t* bias_ids;  // [num_biased] distinct
  const float* bias;
  const int64_t* banned;  // [num_banned]
  const uint32_t* allowed;  // [vocab / 32], a bit for each token; none: all may be drawn
  float temperature;      // 0: greedy
  float repetition, frequency;
  int32_t row;    // of the logits
  int32_t top_k;  // the vocabulary's size when off
  int32_t num_counted, num_biased, num_banned;
  int32_t top_n;  // of log-probabilities; -1: none at all
  int32_t padding;
};
static_assert(sizeof(SampleRow) == 120, "mirrored in sampling/native.py");

enum SampleState : int32_t { kDrawn = 0, kNoToken = 1, kNotFinite = 2 };

// With top_n >= 0 also what its log-probability is made of: of the logits as the model gave them,
// `highest`, `total` = sum of exp(x - highest), the token's own (`chosen`) and its rank.
struct SampleResult {
  int64_t rank;
  double total;
  float highest, chosen;
  int32_t token, state;
};
static_assert(sizeof(SampleResult) == 32, "mirrored in sampling/native.py");

class RowSampler {
 public:
  // `logits` [vocab]; `top_ids`, `top_values` [top_n or more].
  void sample(const float* logits, int vocab, const SampleRow& row, SampleResult& result,
              int32_t* top_ids, float* top_values) {
    x_ = logits;
    vocab_ = vocab;
    num_blocks_ = (vocab + kBlock - 1) / kBlock;
    maxima_.resize(size_t(num_blocks_));
    running_.resize(size_t(num_blocks_));
    edit(row);
    scan();
    temperature_ = row.temperature;
    result.state = state();
    if (result.state == kDrawn) result.token = draw(row);
    if (row.top_n < 0 || result.state != kDrawn) return;
    if (x_ != logits) {
      x_ = logits;
      scan();
    }
    result.state = state();
    if (result.state == kDrawn) describe(result, std::min(row.top_n, vocab), top_ids, top_values);
  }

 private:
  struct Token {
    float x;
    int32_t id;
    float weight;
    // In rank order: the higher logit first, the lower id first among equals.
    bool operator<(const Token& other) const {
      return x != other.x ? x > other.x : id < other.id;
    }
  };

  // ------------------------------------------------------------------------------------ the logits

  // As EditBatch.apply: bias, then penalties, then what is banned or not allowed; on a copy.
  void edit(const SampleRow& row) {
    if (row.num_biased + row.num_counted + row.num_banned == 0 && !row.allowed) return;
    edited_.resize(size_t(vocab_) + 16);
    float* x = edited_.data();
    while (reinterpret_cast<uintptr_t>(x) % 64) ++x;  // a load over two cache lines costs twice
    std::memcpy(x, x_, size_t(vocab_) * 4);
    x_ = x;
    for (int i = 0; i < row.num_biased; ++i) x[row.bias_ids[i]] += row.bias[i];
    for (int i = 0; i < row.num_counted; ++i) {
      const float count = row.counts[i];
      float& at = x[row.token_ids[i]];
      const float lowered =
          float((count > 0.0f ? row.presence : 0.0) + double(row.frequency * count));
      at = (at > 0.0f ? at / row.repetition : at * row.repetition) - lowered;
    }
    for (int i = 0; i < row.num_banned; ++i) x[row.banned[i]] = kMinusInfinity;
    if (row.allowed) restrict_to(row.allowed, x);
  }

  void restrict_to(const uint32_t* allowed, float* x) const {
    for (int start = 0; start < vocab_; start += 32) {
      const uint32_t bits = allowed[start / 32];
      if (bits == 0xffffffff) continue;
      const int count = std::min(32, vocab_ - start);
      for (int i = 0; i < count; ++i)
        x[start + i] = bits >> i & 1 ? x[start + i] : kMinusInfinity;
    }
  }

  const float* block(int b) const {
    return (b + 1) * kBlock <= vocab_ ? x_ + size_t(b) * kBlock : last_;
  }

  // The highest logit of each block and of all; NaN for the latter where one is NaN or +inf.
  void scan() {
    if (vocab_ % kBlock) {
      const float* rest = x_ + size_t(vocab_ / kBlock) * kBlock;
      std::fill(std::copy(rest, rest + vocab_ % kBlock, last_), last_ + kBlock, kMinusInfinity);
    }
    F16 bad = zero();
    highest_ = kMinusInfinity;
    for (int b = 0; b < num_blocks_; ++b) {
      const float* x = block(b);
      F16 most = splat(kMinusInfinity), wrong = zero();
      for (int i = 0; i < kBlock; i += 16) {
        const F16 some = load(x + i);
        most = max(most, some);
        // max gives its second operand where one is NaN; infinity times 0 is NaN.
        wrong = fma(max(splat(-FLT_MAX), some), zero(), wrong);
      }
      bad = add(bad, wrong);
      maxima_[size_t(b)] = max_lanes(most);
      highest_ = std::max(highest_, maxima_[size_t(b)]);
    }
    if (!(sum_lanes(bad) == 0.0f)) highest_ = std::numeric_limits<float>::quiet_NaN();
  }

  int32_t state() const {
    if (std::isfinite(highest_)) return kDrawn;
    return highest_ == kMinusInfinity ? kNoToken : kNotFinite;
  }

  // The k-th highest of the blocks' maxima: k tokens reach it, and less than k blocks have a token
  // above it. -inf where there are not so many blocks.
  float block_floor(int k) {
    if (k > num_blocks_) return kMinusInfinity;
    order_ = maxima_;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
    return order_[size_t(k - 1)];
  }

  // Into `found_`, by id, the tokens above `floor`.
  void gather(float floor) {
    found_.clear();
    for (int b = 0; b < num_blocks_; ++b) {
      if (!(maxima_[size_t(b)] > floor)) continue;
      const float* x = block(b);
      for (int i = 0; i < kBlock; i += 16)
        for (uint32_t mask = greater_mask(load(x + i), splat(floor)); mask; mask &= mask - 1) {
          const int at = i + __builtin_ctz(mask);
          found_.push_back({x[at], b * kBlock + at, 0.0f});
        }
    }
  }

  // Into `found_` those above the value returned, the first k in rank order; where they are fewer,
  // the k-th highest is that value.
  float rank(int k) {
    const float floor = block_floor(k);
    gather(floor);
    const size_t sorted = std::min(size_t(k), found_.size());
    std::partial_sort(found_.begin(), found_.begin() + long(sorted), found_.end());
    return floor;
  }

  // ----------------------------------------------------------------------------------- the weights

  // exp((x - highest) / temperature), by true division as torch does it
  F16 weight(F16 x) const {
    return exp(divide(add(x, splat(-highest_)), splat(temperature_)));
  }

  // Running sums of the weights over the blocks; the last is returned.
  double weigh() {
    double whole = 0.0;
    for (int b = 0; b < num_blocks_; ++b) {
      // Rounding keeps the order, so if the highest weighs nothing, none of the block does.
      if (!((maxima_[size_t(b)] - highest_) / temperature_ < kLowestExponent)) {
        const float* x = block(b);
        F16 sum = zero();
        for (int i = 0; i < kBlock; i += 16) sum = add(sum, weight(load(x + i)));
        whole += double(sum_lanes(sum));
      }
      running_[size_t(b)] = whole;
    }
    return whole;
  }

  // -------------------------------------------------------------------------------------- the draw

  int draw(const SampleRow& row) {
    if (!(row.temperature > 0.0f)) return first_highest();
    if (row.top_p < 1.0 || row.min_p > 0.0 || row.top_k < vocab_) return draw_filtered(row);
    return draw_in_order(row.draw * weigh());
  }

  int first_highest() const {
    int b = 0, i = 0;
    while (maxima_[size_t(b)] != highest_) ++b;
    for (const float* x = block(b); x[i] != highest_;) ++i;
    return b * kBlock + i;
  }

  // Inverse CDF over the vocabulary in its own order, `weigh` done: first the block, then the token
  // in it. Should rounding leave nothing above the target, the last that has weight.
  int draw_in_order(double target) const {
    double before = 0.0, reached = 0.0;
    int found = 0;
    for (int b = 0; b < num_blocks_ && reached <= target; ++b) {
      if (!(running_[size_t(b)] > reached)) continue;
      before = reached;
      reached = running_[size_t(b)];
      found = b;
    }
    float weights[kBlock];
    for (int i = 0; i < kBlock; i += 16) store(weights + i, weight(load(block(found) + i)));
    double inner = 0.0;
    int last = 0;
    for (int i = 0; i < kBlock && before + inner <= target; ++i) {
      if (!(weights[i] > 0.0f)) continue;
      inner += double(weights[i]);
      last = i;
    }
    return found * kBlock + last;
  }

  // With top-k, top-p or min-p: in rank order where the 64 highest logits decide it, that is, where
  // what is kept is above the last of them and top-p is not relative to a larger top-k. `wide`:
  // top-p is relative to more than the 64.
  int draw_filtered(const SampleRow& row) {
    const bool all = row.top_k >= vocab_, wide = row.top_p < 1.0 && (all || row.top_k > kTop);
    if (wide && !all) return draw_beyond(row);
    const float floor = rank(kTop);
    float values[kTop], weights[kTop];
    double sums[kTop], sum = 0.0;
    for (size_t i = 0; i < kTop; ++i) values[i] = i < found_.size() ? found_[i].x : floor;
    for (int i = 0; i < kTop; i += 16) store(weights + i, weight(load(values + i)));
    for (int i = 0; i < kTop; ++i) sums[i] = sum += double(weights[i]);
    const double whole = wide ? weigh() : sums[std::min(row.top_k, kTop) - 1];
    int count = 1;  // a token is in while the mass before it is short of top-p; the first always is
    while (count < kTop && count < row.top_k && weights[count] > 0.0f &&
           double(weights[count]) >= row.min_p &&
           (row.top_p >= 1.0 || sums[count] - double(weights[count]) < row.top_p * whole))
      ++count;
    if (!(values[count - 1] > values[kTop - 1])) return draw_beyond(row);
    const double target = row.draw * sums[count - 1];
    int chosen = 0;
    while (chosen < count - 1 && sums[chosen] <= target) ++chosen;
    return found_[size_t(chosen)].id;
  }

  // However far the filters reach: what they keep is drawn in the vocabulary's order.
  int draw_beyond(const SampleRow& row) {
    // What is certainly out need not be looked at; these bounds leave a little more than needed.
    double exponent = kLowestExponent;
    const bool all = row.top_k >= vocab_;  // else top-p is relative to what top-k leaves, all of it
    if (row.min_p > 0.0 && (all || row.top_p >= 1.0))
      exponent = std::max(exponent, std::log(row.min_p));
    if (row.top_p < 1.0 && all) {
      // All that weigh less than this have together no more than what top-p leaves out.
      const double least = (1.0 - row.top_p - 1e-6) * running_[size_t(num_blocks_ - 1)] / vocab_;
      if (least > 0.0) exponent = std::max(exponent, std::log(least));
    }
    float floor = float(double(highest_) + (exponent - 0.01) * double(temperature_));
    floor = std::max(floor, std::nextafter(block_floor(row.top_k), kMinusInfinity));
    gather(std::min(floor, std::nextafter(highest_, kMinusInfinity)));
    weigh_found();

    if (!all) keep_prefix(double(row.top_k), [](const Token&) { return 1.0; });
    if (row.top_p < 1.0) {
      const double whole = all ? running_[size_t(num_blocks_ - 1)] : sum_found();
      keep_prefix(row.top_p * whole, [](const Token& token) { return double(token.weight); });
    }
    if (row.min_p > 0.0)
      drop([&](const Token& token) { return double(token.weight) < row.min_p; });
    const double target = row.draw * sum_found();
    int32_t chosen = 0;
    double sum = 0.0;
    for (const Token& token : found_) {
      if (!(token.weight > 0.0f)) continue;
      chosen = token.id;
      if ((sum += double(token.weight)) > target) break;
    }
    return chosen;
  }

  void weigh_found() {
    float x[16] = {}, weights[16];
    for (size_t i = 0; i < found_.size(); i += 16) {
      const size_t count = std::min(size_t(16), found_.size() - i);
      for (size_t j = 0; j < count; ++j) x[j] = found_[i + j].x;
      store(weights, weight(load(x)));
      for (size_t j = 0; j < count; ++j) found_[i + j].weight = weights[j];
    }
  }

  double sum_found() const {
    double sum = 0.0;
    for (const Token& token : found_) sum += double(token.weight);
    return sum;
  }

  template <class Condition>
  void drop(Condition&& condition) {
    found_.erase(std::remove_if(found_.begin(), found_.end(), condition), found_.end());
  }

  // Keep of `found_` the shortest run in rank order whose mass is at least `need`. As
  // shortest_prefix in ranking.py: a histogram over the logits finds the bucket in which the sum
  // crosses `need`, and only that one is sorted.
  template <class Mass>
  void keep_prefix(double need, Mass&& mass) {
    float low = highest_;
    for (const Token& token : found_) low = std::min(low, token.x);
    const double top = double(highest_);
    const double scale = double(kBuckets - 1) / std::max(top - double(low), 1e-300);
    const auto bucket = [&](const Token& token) {
      return size_t((top - double(token.x)) * scale);
    };
    buckets_.assign(kBuckets, 0.0);
    for (const Token& token : found_) buckets_[bucket(token)] += mass(token);
    double sum = 0.0;
    size_t edge = 0;
    while (edge < kBuckets && sum + buckets_[edge] < need) sum += buckets_[edge++];
    if (edge == kBuckets) return;
    inside_.clear();
    for (const Token& token : found_)
      if (bucket(token) == edge) inside_.push_back(token);
    std::sort(inside_.begin(), inside_.end());
    size_t last = 0;
    for (double inner = 0.0; last + 1 < inside_.size(); ++last)
      if (!(sum + (inner += mass(inside_[last])) < need)) break;
    const Token final = inside_[last];
    drop([&](const Token& token) { return final < token; });
  }

  // ----------------------------------------------------------------------------- log-probabilities

  void describe(SampleResult& result, int top_n, int32_t* top_ids, float* top_values) {
    temperature_ = 1.0f;
    result.highest = highest_;
    result.total = weigh();
    result.chosen = x_[result.token];
    result.rank = 0;
    for (int b = 0; b < num_blocks_; ++b) {
      if (maxima_[size_t(b)] < result.chosen) continue;
      const float* x = block(b);
      const F16 chosen = splat(result.chosen);
      for (int i = 0; i < kBlock; i += 16) {
        const F16 some = load(x + i);
        const uint32_t above = greater_mask(some, chosen);
        const uint32_t equal = 0xffff & ~(above | greater_mask(chosen, some));
        const int lower = std::clamp(result.token - (b * kBlock + i), 0, 16);  // lower ids
        result.rank += __builtin_popcount(above) +
                       __builtin_popcount(equal & ((uint32_t(1) << lower) - 1));
      }
    }
    if (top_n < 1) return;
    const float floor = rank(top_n);
    // Equals of the floor come by id.
    for (int b = 0; b < num_blocks_ && found_.size() < size_t(top_n); ++b) {
      if (maxima_[size_t(b)] < floor) continue;
      const int end = std::min(vocab_, (b + 1) * kBlock);
      for (int id = b * kBlock; id < end && found_.size() < size_t(top_n); ++id)
        if (x_[id] == floor) found_.push_back({x_[id], id, 0.0f});
    }
    for (int i = 0; i < top_n; ++i) {
      top_ids[i] = found_[size_t(i)].id;
      top_values[i] = found_[size_t(i)].x;
    }
  }

  const float* x_ = nullptr;
  int vocab_ = 0, num_blocks_ = 0;
  float highest_ = 0.0f, temperature_ = 1.0f;
  float last_[kBlock];           // the last block, filled up with -inf
  std::vector<float> maxima_;    // of each block
  std::vector<double> running_;  // weight up to and with each block
  std::vector<float> edited_;    // the row, where it has edits
  std::vector<Token> found_, inside_;
  std::vector<float> order_;
  std::vector<double> buckets_;
};

}  // namespace hw
