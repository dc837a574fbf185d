// The sampler's kernel against a full sort in double, and itself in other batches.
#pragma once

#include <algorithm>
#include <set>
#include <utility>

#include "matrices.hpp"

namespace test {

// One unit in the last place is 1.2e-7 of the value or less.
inline void check_exp() {
  verdict.in("exp");
  float x[16], got[16];
  for (int i = 0; i < 20000; ++i) {
    for (int lane = 0; lane < 16; ++lane) x[lane] = -87.3364f * float(16 * i + lane) / 319999.0f;
    store(got, exp(load(x)));
    for (int lane = 0; lane < 16; ++lane) {
      const double expected = std::exp(double(x[lane]));
      verdict.close("value", size_t(16 * i + lane), got[lane] / expected, 1.0, 1.25e-7);
    }
  }
  const float edges[16] = {0.0f, -0.0f, -87.34f, -1e30f, -INFINITY};
  store(got, exp(load(edges)));
  for (int lane : {0, 1}) verdict.close("one", size_t(lane), got[lane], 1.0, 0.0);
  for (int lane : {2, 3, 4}) verdict.close("nothing", size_t(lane), got[lane], 0.0, 0.0);
}

// A row's parameters, with the arrays that they point to.
struct SamplingCase {
  SampleRow row{};
  Exact<float> logits, counts, bias;
  Exact<int64_t> ids, bias_ids, banned;
  Exact<uint32_t> allowed;

  SampleRow c(int at) const {
    SampleRow r = row;
    r.row = at;
    r.token_ids = ids.data();
    r.counts = counts.data();
    r.bias_ids = bias_ids.data();
    r.bias = bias.data();
    r.banned = banned.data();
    r.allowed = allowed.size() ? allowed.data() : nullptr;
    r.num_counted = int32_t(ids.size());
    r.num_biased = int32_t(bias_ids.size());
    r.num_banned = int32_t(banned.size());
    return r;
  }
};

inline Exact<int64_t> some_ids(int count, int vocab, Random& random) {
  std::set<int64_t> ids;
  for (int i = 0; i < std::min(count, vocab); ++i) ids.insert(random.below(vocab));
  return Exact<int64_t>(std::vector<int64_t>(ids.begin(), ids.end()));
}

template <class T>
T pick(std::initializer_list<T> values, Random& random) {
  return values.begin()[random.below(int(values.size()))];
}

inline SamplingCase sampling_case(int vocab, Random& random) {
  SamplingCase c;
  c.logits = Exact<float>(size_t(vocab));
  const float scale = pick({0.1f, 1.0f, 3.0f, 10.0f}, random);
  const int style = random.below(5);
  for (float* x = c.logits.data(); x != c.logits.data() + vocab; ++x) {
    *x = scale * random.normal();
    if (style == 0) *x = std::round(*x);  // many equals
    if (style == 1 && random.below(2)) *x = -INFINITY;
  }
  if (style == 2) std::fill_n(c.logits.data(), vocab, -2.5f);
  c.logits[size_t(random.below(vocab))] = 1.0f;
  c.row.draw = random.uniform();
  c.row.temperature = pick({0.0f, 0.2f, 0.7f, 1.0f, 2.0f, 1e-30f, 1e30f}, random);
  c.row.top_k = std::min(vocab, pick({vocab, vocab, 1, 40, 64, 65, 200}, random));
  c.row.top_p = pick({1.0, 1.0, 0.0, 0.5, 0.9, 0.9999999}, random);
  c.row.min_p = pick({0.0, 0.0, 0.0, 1e-4, 0.1}, random);
  c.row.top_n = pick({-1, 0, 5, 100}, random);
  c.row.repetition = 1.0f;
  if (random.below(2)) {
    c.ids = some_ids(300, vocab, random);
    c.counts = Exact<float>(c.ids.size());
    for (size_t i = 0; i < c.counts.size(); ++i) c.counts[i] = float(random.below(4));
    c.row.repetition = pick({1.0f, 1.3f, 0.8f}, random);
    c.row.presence = pick({0.0, 1.0, -2.0}, random);
    c.row.frequency = pick({0.0f, 0.5f}, random);
  }
  if (random.below(2)) {
    c.bias_ids = some_ids(3, vocab, random);
    c.bias = Exact<float>(c.bias_ids.size(), pick({-100.0f, 2.5f, 1e30f}, random));
  }
  if (vocab > 2 && random.below(2)) c.banned = some_ids(2, vocab, random);
  if (random.below(2)) {
    c.allowed = Exact<uint32_t>(size_t(vocab + 31) / 32, pick({0u, 0xffffffffu}, random));
    for (int i = pick({0, 1, 40, vocab}, random); i > 0; --i) {
      const int id = random.below(vocab);
      c.allowed[size_t(id / 32)] ^= uint32_t(1) << id % 32;
    }
  }
  return c;
}

inline std::vector<float> edited(const SamplingCase& c) {
  std::vector<float> x(c.logits.data(), c.logits.data() + c.logits.size());
  for (size_t i = 0; i < c.bias.size(); ++i) x[size_t(c.bias_ids[i])] += c.bias[i];
  for (size_t i = 0; i < c.ids.size(); ++i) {
    float& at = x[size_t(c.ids[i])];
    at = at > 0 ? at / c.row.repetition : at * c.row.repetition;
    at -= float((c.counts[i] > 0 ? c.row.presence : 0.0) + double(c.row.frequency * c.counts[i]));
  }
  for (size_t i = 0; i < c.banned.size(); ++i) x[size_t(c.banned[i])] = -INFINITY;
  for (size_t i = 0; c.allowed.size() && i < x.size(); ++i)
    if (!(c.allowed[i / 32] >> i % 32 & 1)) x[i] = -INFINITY;
  return x;
}

inline std::vector<int> in_rank_order(const std::vector<float>& x) {
  std::vector<int> order(x.size());
  for (size_t i = 0; i < x.size(); ++i) order[i] = int(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return x[size_t(a)] > x[size_t(b)]; });
  return order;
}

// The tokens that the draw may give: one, unless the draw or a filter falls on a border, where the
// rounding of float32 decides.
inline std::set<int> accepted(const SamplingCase& c, const std::vector<float>& x) {
  const std::vector<int> order = in_rank_order(x);
  const SampleRow& r = c.row;
  if (r.temperature == 0.0f) return {order[0]};
  const int vocab = int(x.size());
  const auto logit = [&](int place) { return double(x[size_t(order[size_t(place)])]); };
  std::vector<double> weights(x.size());
  for (int i = 0; i < vocab; ++i)
    weights[size_t(i)] = std::exp((logit(i) - logit(0)) / double(r.temperature));
  std::set<int> tokens;
  for (double slack : {0.0, -5e-6, 5e-6}) {
    int kept = r.top_k;
    if (r.top_p < 1.0) {
      double whole = 0.0, sum = 0.0;
      for (int i = 0; i < kept; ++i) whole += weights[size_t(i)];
      int n = 0;
      while (n < kept && sum < r.top_p * (1.0 + slack) * whole) sum += weights[size_t(n++)];
      kept = std::max(n, 1);
    }
    int n = 1;  // what float32 has no weight for is out
    while (n < kept && weights[size_t(n)] >= std::max(r.min_p * (1.0 + slack), 1.1755e-38)) ++n;
    kept = n;
    const bool filtered = r.top_p < 1.0 || r.min_p > 0.0 || r.top_k < vocab;
    const double seen = vocab < kTop ? -INFINITY : logit(kTop - 1);
    const bool in_rank = filtered && logit(kept - 1) > seen &&
                         !(r.top_k > kTop && r.top_k < vocab && r.top_p < 1.0);
    std::vector<int> places(static_cast<size_t>(kept));
    for (int i = 0; i < kept; ++i) places[size_t(i)] = i;
    if (!in_rank)
      std::sort(places.begin(), places.end(),
                [&](int a, int b) { return order[size_t(a)] < order[size_t(b)]; });
    double sum = 0.0;
    for (int place : places) sum += weights[size_t(place)];
    for (double shift : {0.0, -5e-6, 5e-6}) {
      const double target = std::min(std::max(r.draw + shift, 0.0), 1.0) * sum;
      double reached = 0.0;
      int token = order[size_t(places[0])];
      for (int place : places) {
        token = order[size_t(place)];
        if ((reached += weights[size_t(place)]) > target) break;
      }
      tokens.insert(token);
    }
  }
  return tokens;
}

inline void check_result(const SamplingCase& c, const SampleResult& got, const int32_t* ids,
                         const float* values) {
  const std::vector<float> x = edited(c);
  if (*std::max_element(x.begin(), x.end()) == -INFINITY) {
    verdict.close("state", 0, got.state, kNoToken, 0.0);
    return;
  }
  verdict.close("state", 0, got.state, kDrawn, 0.0);
  const std::set<int> tokens = accepted(c, x);
  verdict.close("token", 0, got.token, tokens.count(got.token) ? got.token : *tokens.begin(), 0.0);
  if (c.row.top_n < 0) return;
  const std::vector<float> raw(c.logits.data(), c.logits.data() + c.logits.size());
  const std::vector<int> order = in_rank_order(raw);
  double total = 0.0;
  for (float logit : raw) total += std::exp(double(logit) - double(raw[size_t(order[0])]));
  verdict.close("highest", 0, got.highest, raw[size_t(order[0])], 0.0);
  verdict.close("chosen", 0, got.chosen, raw[size_t(got.token)], 0.0);
  verdict.close("total", 0, got.total, total, 2e-6 * total);
  verdict.close("rank", 0, order[size_t(got.rank)], got.token, 0.0);
  for (int i = 0; i < std::min(c.row.top_n, int(raw.size())); ++i) {
    verdict.close("top id", size_t(i), ids[i], order[size_t(i)], 0.0);
    const float expected = raw[size_t(order[size_t(i)])];
    verdict.same_bits("top logit", values + i, &expected, 1);
  }
}

struct SamplingResults {
  Exact<SampleResult> results;
  Exact<int32_t> ids;
  Exact<float> values;
};

inline SamplingResults sample(int threads, const std::vector<SamplingCase>& cases, int stride) {
  const size_t count = cases.size(), vocab = cases[0].logits.size();
  Exact<float> logits(count * vocab);
  Exact<SampleRow> rows(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = count - 1 - i;  // rows need not be in order
    std::memcpy(logits.data() + at * vocab, cases[i].logits.data(), vocab * 4);
    rows[i] = cases[i].c(int(at));
  }
  SamplingResults out{Exact<SampleResult>(count), Exact<int32_t>(count * size_t(stride), -1),
                      Exact<float>(count * size_t(stride))};
  void* engine = hw_create(threads);
  for (int again = 0; again < 2; ++again)  // nothing may be left from the time before
    hw_sample(engine, logits.data(), int32_t(vocab), int32_t(count), rows.data(),
              out.results.data(), stride, out.ids.data(), out.values.data());
  hw_destroy(engine);
  return out;
}

inline void check_sampling(int vocab, int num_rows, uint64_t seed) {
  Random random(seed);
  std::vector<SamplingCase> cases;
  for (int i = 0; i < num_rows; ++i) cases.push_back(sampling_case(vocab, random));
  const int stride = std::min(vocab, 100);
  const SamplingResults together = sample(3, cases, stride);
  for (int i = 0; i < num_rows; ++i) {
    const size_t at = size_t(i), top = at * size_t(stride);
    verdict.in("sampling " + std::to_string(vocab) + " tokens, row " + std::to_string(i));
    check_result(cases[at], together.results[at], &together.ids[top], &together.values[top]);
    const SamplingResults alone = sample(1, {cases[at]}, stride);
    verdict.same_bits("alone: result", reinterpret_cast<const uint32_t*>(&alone.results[0]),
                      reinterpret_cast<const uint32_t*>(&together.results[at]),
                      sizeof(SampleResult) / 4);
    verdict.same_bits("alone: top", alone.ids.data(), &together.ids[top], size_t(stride));
  }
  // What cannot be drawn from is told, wherever it is.
  for (float bad : {NAN, INFINITY})
    for (int place : {0, vocab / 2, vocab - 1}) {
      SamplingCase& c = cases[0];
      const float before = std::exchange(c.logits[size_t(place)], bad);
      c.ids = c.bias_ids = c.banned = Exact<int64_t>();
      c.allowed = Exact<uint32_t>();
      verdict.in("sampling, not finite");
      verdict.close("state", size_t(place), sample(1, {c}, stride).results[0].state, kNotFinite, 0);
      c.logits[size_t(place)] = before;
    }
}

}  // namespace test
