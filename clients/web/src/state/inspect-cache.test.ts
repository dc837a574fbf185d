import { describe, expect, it } from "vitest";

import type { ModelFacts } from "../api/inspect";
import type { CacheReport } from "../api/types";
import { bytes, clockAt, numberBytes, reuse, showSpeed, whyComputed } from "./inspect-cache";
import { ticks, toUnit } from "./inspect-norms";

const report = (last: CacheReport["last_turn"]): CacheReport => ({
  session: "sess_1",
  head: "turn_1",
  tokens: 93,
  block_size: 16,
  tiers: { device: 80, host: 0, disk: 0, none: 13 },
  on_disk: 80,
  blocks: [],
  last_turn: last,
});

const last = {
  turn: "turn_1",
  prompt_tokens: 81,
  cached_tokens: { device: 32, host: 0, disk: 16 },
  expected_tokens: 48,
  miss: null,
};

describe("reuse", () => {
  it("is the whole prompt in parts", () => {
    expect(reuse(report(last))).toEqual([
      { tier: "device", tokens: 32 },
      { tier: "disk", tokens: 16 },
      { tier: "none", tokens: 33 },
    ]);
    expect(reuse(report(null))).toEqual([]);
  });
});

describe("whyComputed", () => {
  it("tells the first answer from one that found all", () => {
    expect(whyComputed(report(null))).toMatch(/No answer/);
    const nothing = { device: 0, host: 0, disk: 0 };
    expect(whyComputed(report({ ...last, expected_tokens: 0 }))).toMatch(/share/);
    expect(whyComputed(report({ ...last, expected_tokens: 0, cached_tokens: nothing }))).toMatch(
      /nothing to find/,
    );
    expect(whyComputed(report(last))).toMatch(/only what was new/);
  });

  it("says where each kind of miss began", () => {
    const told = ["evicted", "corrupt", "dropped", "template", "instructions", "unheard"].map(
      (reason) => whyComputed(report({ ...last, miss: { reason, token: 26 } })),
    );
    for (const sentence of told) expect(sentence).toContain("26");
    expect(new Set(told).size).toBe(told.length);
    expect(whyComputed(report({ ...last, miss: { reason: "model", token: 0 } }))).toMatch(/model/);
  });
});

it("writes bytes", () => {
  expect([23040, 512, 150 * 1024 * 1024].map(bytes)).toEqual(["22.5 KiB", "512 B", "150 MiB"]);
});

it("tells the bytes of a number from those of a token", () => {
  const model = { kv_bytes_per_token: 23040, blocks: 30, kv_heads: 3, head_dim: 64 } as ModelFacts;
  expect(numberBytes(model)).toBe(2);
});

describe("the clocks", () => {
  const run = {
    prompt_tokens: 31,
    tokens: 100,
    with_cache: { seconds: 0.5, tokens_per_s: 200 },
    without_cache: { seconds: 20, tokens_per_s: 5 },
    speedup: 40,
    tokens_equal: true,
    text: "",
  };

  it("run at the same pace, each to its own end", () => {
    expect(clockAt(run.with_cache, 100, 0.25)).toEqual({
      seconds: 0.25,
      tokens: 50,
      share: 0.5,
      done: false,
    });
    expect(clockAt(run.with_cache, 100, 5)).toEqual({
      seconds: 0.5,
      tokens: 100,
      share: 1,
      done: true,
    });
    expect(clockAt(run.without_cache, 100, 5).tokens).toBe(25);
  });

  it("are shown faster when they took long", () => {
    expect(showSpeed(run)).toBe(3);
    expect(showSpeed({ ...run, without_cache: { seconds: 3, tokens_per_s: 33 } })).toBe(1);
  });
});

describe("the logarithmic axis", () => {
  it("encloses all values", () => {
    expect(ticks([3, 40, 2500])).toEqual([1, 10, 100, 1000, 10000]);
    expect(ticks([0.02, 0.5])).toEqual([0.01, 0.1, 1]);
    expect(ticks([0])).toEqual([1, 10]);
  });

  it("has equal steps for equal factors", () => {
    const marks = ticks([1, 1000]);
    expect([1, 10, 100, 1000].map((value) => toUnit(value, marks))).toEqual([
      0,
      expect.closeTo(1 / 3, 9) as number,
      expect.closeTo(2 / 3, 9) as number,
      1,
    ]);
    expect(toUnit(0, marks)).toBe(0);
  });
});
