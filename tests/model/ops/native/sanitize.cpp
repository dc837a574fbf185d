// The kernels, driven through their C entry points with buffers that end exactly where they say,
// and checked against `naive.hpp`. Built under AddressSanitizer and UndefinedBehaviorSanitizer,
// under ThreadSanitizer, and with AVX-512 emulated; see test_native_sanitizers.py.
//
//   sanitize SIZE    SIZE: small (for ThreadSanitizer), normal, or long
//
// Prints the instruction set and the number of comparisons; exits 1 at the first mismatch.
#include "stalls.hpp"

#include "attention_checks.hpp"
#include "layer_checks.hpp"
#include "linear_checks.hpp"
#include "phases_checks.hpp"
#include "sampling_checks.hpp"

using test::AttentionCase;
using test::check_linear;
using test::Values;

namespace {

const int kKinds[] = {kQ4, kQ8, kBF16, kF32};
const Transform kTransforms[] = {kPlain, kNormed, kSilu};

void check_linears(bool small) {
  const std::vector<int> few{17, 1}, many{65, 1, 2, 3, 4, 5, 17, 64};
  uint64_t seed = 1;
  for (int kind : kKinds) {
    for (Transform transform : kTransforms)
      for (bool add : {false, true}) {
        // One group of inputs; one output, part of a strip, several strips and a part.
        check_linear({kind, {1}, 32, transform, add, !add}, few, {2}, ++seed);
        check_linear({kind, {20, 5, 8}, 96, transform, add, add}, few, {3}, ++seed);
        if (kind == kQ4 || kind == kQ8)
          check_linear({kind, {33}, 64, transform, add, !add, Values::kRandom, true}, few, {2},
                       ++seed);
      }
    if (small) continue;
    check_linear({kind, {48}, 160, kNormed, false, true}, many, {1, 2, 3, 4}, ++seed);
    check_linear({kind, {16, 16, 300}, 32, kPlain, true, false}, many, {1, 4}, ++seed);
    check_linear({kind, {40}, 64, kSilu, true, false}, many, {2}, ++seed);
    if (kind == kQ4 || kind == kQ8) {
      check_linear({kind, {33}, 64, kPlain, false, false, Values::kExtreme}, many, {2}, ++seed);
      check_linear({kind, {300}, 160, kPlain, false, true, Values::kRandom, true}, many, {1, 2},
                   ++seed);
    } else  // no groups: as few as a norm takes
      check_linear({kind, {7}, 16, kNormed, false, false}, many, {2}, ++seed);
  }
}

void check_attention(bool small, bool all) {
  std::vector<AttentionCase> cases{
      {"one key, smallest head", 1, 1, 16, 16, {{1, 1}}},
      {"small mixture", 3, 1, 32, 16, {{5, 5}, {33, 1}, {513, 1}, {40, 9}}, 0, 16},
      {"merged spans", 8, 1, 16, 32, {{1025, 1}, {520, 3}, {520, 4}}},
  };
  if (!small) {
    cases.insert(
        cases.end(),
        {{"spans' edges", 6, 2, 32, 16, {{511, 1}, {512, 1}, {513, 1}, {1025, 1}, {1, 1}, {64, 1}}},
         {"prefills and decodes", 3, 1, 64, 16, {{300, 65}, {17, 17}, {513, 1}, {65, 2}, {530, 9}}},
         {"one head each", 2, 2, 16, 64, {{530, 25}, {530, 24}, {1025, 1}, {100, 100}}},
         {"eight heads share", 16, 2, 32, 32, {{513, 3}, {513, 4}, {70, 70}, {1025, 2}}},
         {"32 heads share", 32, 1, 16, 64, {{1025, 1}, {513, 2}, {40, 20}}},
         {"24 heads share", 48, 2, 16, 16, {{513, 1}, {513, 2}, {20, 5}}},
         {"widest head", 2, 1, 256, 16, {{65, 17}, {513, 1}, {530, 5}}},
         {"window of one", 3, 1, 16, 16, {{513, 1}, {40, 30}, {1, 1}}, 1},
         {"window of 7", 3, 1, 16, 32, {{1025, 1}, {516, 12}, {70, 65}, {3, 3}}, 7},
         {"window of 64", 2, 2, 16, 16, {{576, 1}, {577, 2}, {200, 70}}, 64},
         {"window beyond a span", 3, 1, 16, 16, {{1025, 1}, {1100, 2}, {1025, 20}, {90, 9}}, 600},
         {"norms, half a head turns", 4, 2, 32, 16, {{34, 34}, {513, 1}}, 0, 16, true},
         {"sharp", 3, 1, 64, 16, {{1025, 1}, {530, 20}}, 0, 0, false, 12.0f}});
  }
  if (all)
    cases.insert(cases.end(),
                 {{"long prefill", 3, 1, 16, 16, {{1025, 1025}, {700, 1}}},
                  {"long prefill, wide", 32, 1, 32, 32, {{300, 300}, {2049, 1}}},
                  {"long prefill, window", 1, 1, 128, 64, {{1200, 700}, {1025, 3}}, 520}});
  uint64_t seed = 100;
  for (const AttentionCase& c : cases) test::World(c, ++seed).check({2, 1, 3, 4});
}

}  // namespace

int main(int count, char** arguments) {
  const std::string size = count > 1 ? arguments[1] : "normal";
  const bool small = size == "small", all = size == "long";
  for (int num_threads : {2, 3, 4}) test::check_a_stopped_thread(num_threads);
  check_linears(small);
  for (int kind : kKinds) test::check_embedding(kind, 2);
  for (int width : {16, 48, 576}) test::check_norm(small ? 5 : 70, width, 3);
  test::check_silu_edges();
  check_attention(small, all);
  test::check_exp();
  for (int vocab : {1, 2, 17, 63, 64, 255, 256, 257, 3000})
    test::check_sampling(vocab, small ? 4 : 40, uint64_t(vocab));
  test::check_sampling(49152, small ? 2 : 12, 5);
  if (!small) test::check_sampling(151936, 6, 6);
  for (int kind : kKinds) test::check_layer(kind, small ? 2 : 6);
  std::printf("instruction set: %s\ncomparisons: %ld\n", hw_instruction_set(),
              test::verdict.count());
  return 0;
}
