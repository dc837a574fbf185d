// A whole layer in one program, on one engine that lives through steps of all sizes, against its
// instructions run one by one, each on an engine of its own: the same bits. (What each instruction
// computes is checked elsewhere.)
#pragma once

#include "matrices.hpp"

namespace test {

inline void check_layer(int kind, int num_steps) {
  Random random(uint64_t(kind) + 50);
  constexpr int kHidden = 64, kHeads = 4, kKVHeads = 2, kDim = 16, kWide = 96, kBlock = 16;
  constexpr int kVocab = 40, kMost = 80, kQKV = (kHeads + 2 * kKVHeads) * kDim;
  constexpr int kRuns = 2, kBlocks = 32 * kRuns;
  const TestMatrix embedding = make_matrix(kind, {kVocab}, kHidden, false, random);
  const TestMatrix qkv = make_matrix(kind, {kHeads * kDim, kKVHeads * kDim, kKVHeads * kDim},
                                     kHidden, true, random);
  const TestMatrix output = make_matrix(kind, {kHidden}, kHeads * kDim, false, random);
  const TestMatrix up = make_matrix(kind, {kWide, kWide}, kHidden, false, random);
  const TestMatrix down = make_matrix(kind, {kHidden}, kWide, false, random);
  Exact<float> norm(kHidden), cos(kMost * kDim / 2), sin(kMost * kDim / 2);
  random.fill(norm);
  random.fill(cos);
  random.fill(sin);

  enum : int { kX, kHeadsOfAll, kAttended, kGateUp, kResult };
  std::vector<Instruction> program{
      instruction(kEmbed, 0, kX),
      instruction(kLinear, kX, kHeadsOfAll, kNormed),
      instruction(kRopeKV, kHeadsOfAll, 0),
      instruction(kAttend, kHeadsOfAll, kAttended),
      instruction(kLinear, kAttended, kX),
      instruction(kLinear, kX, kGateUp, kNormed),
      instruction(kLinear, kGateUp, kX, kSilu),
      instruction(kNorm, kX, kResult),
  };
  program[0].matrix = embedding.c();
  program[1].matrix = qkv.c();
  program[4].matrix = output.c();
  program[5].matrix = up.c();
  program[6].matrix = down.c();
  program[4].add = program[6].add = 1;
  for (size_t i : {1, 5, 7}) {
    program[i].norm = norm.data();
    program[i].eps = 1e-5f;
  }

  Model model{};
  model.heads = {kHeads, kKVHeads, kDim, kBlock};
  model.rotary = kDim;
  void* engine = hw_create(3);
  const int sizes[] = {5, kMost, 1, 4, 65, 2};
  for (int trial = 0; trial < num_steps; ++trial) {
    const int tokens = sizes[trial % 6];
    verdict.in("layer, " + std::to_string(tokens) + " tokens");
    // The last token is a sequence of its own, where there are several.
    const int first = tokens > 1 ? tokens - 1 : tokens;
    Exact<int64_t> ids{size_t(tokens)}, positions{size_t(tokens)}, slots{size_t(tokens)};
    const int sequences = tokens > 1 ? 2 : 1, most = (first + kBlock - 1) / kBlock;
    Exact<int64_t> tables(size_t(sequences * most));
    Exact<int32_t> starts(size_t(sequences) + 1), lens{size_t(sequences)};
    for (size_t b = 0; b < tables.size(); ++b) tables[b] = int64_t((b * 5 + 3) % kBlocks);
    for (int t = 0; t < tokens; ++t) {
      const int s = t / first;
      ids[size_t(t)] = random.below(kVocab);
      const int position = t % first;
      positions[size_t(t)] = position;
      slots[size_t(t)] =
          tables[size_t(s * most + position / kBlock)] * kBlock + position % kBlock;
    }
    starts[0] = 0;
    starts[1] = lens[0] = first;
    if (sequences > 1) {
      starts[2] = tokens;
      lens[1] = 1;
    }
    Step step{};
    step.num_sequences = sequences;
    step.max_blocks = most;
    step.token_ids = ids.data();
    step.positions = positions.data();
    step.slots = slots.data();
    step.block_tables = tables.data();
    step.query_start = starts.data();
    step.seq_lens = lens.data();
    step.cos = cos.data();
    step.sin = sin.data();
    step.num_runs = kRuns;
    step.layer_stride = 2 * kBlocks * kKVHeads * kBlock * kDim;
    Exact<uint16_t> at_once(size_t(step.layer_stride), 0x7fc1), apart = at_once;
    Buffers whole{tokens, {}, {}}, parts{tokens, {}, {}};
    for (int width : {kHidden, kQKV, kHeads * kDim, 2 * kWide, kHidden}) {
      whole.add(width);
      parts.add(width);
    }
    step.kv = at_once.data();
    run(engine, program, whole, model, step);
    step.kv = apart.data();
    for (const Instruction& each : program) run_fresh(1 + trial % 4, {each}, parts, model, step);
    for (size_t b = 0; b < whole.data.size(); ++b)
      verdict.same_bits("buffer", whole.data[b].data(), parts.data[b].data(),
                        whole.data[b].size());
    verdict.same_bits("cache", at_once.data(), apart.data(), apart.size());
    for (size_t i = 0; i < whole.data[kResult].size(); ++i)
      verdict.close("finite result", i, whole.data[kResult][i], 0.0, 1e6);
  }
  hw_destroy(engine);
}

}  // namespace test
