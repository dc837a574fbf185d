import { describe, expect, it } from "vitest";

import type { Forward } from "../api/inspect";
import type { Turn } from "../api/types";
import {
  exampleIt,
  firstLook,
  firstSurprise,
  layersFor,
  look,
  pathTokens,
  penalties,
  seenTokens,
  spanAround,
  summary,
} from "./inspect";

const turn = (id: string, prompt: number[], own: number[], more: Partial<Turn> = {}): Turn => ({
  id,
  session: "sess_1",
  parent: null,
  role: "assistant",
  content: [],
  status: "complete",
  finish_reason: "stop",
  generation: null,
  num_tokens: own.length,
  created_at: 0,
  prompt_token_ids: prompt,
  token_ids: own,
  ...more,
});

describe("pathTokens", () => {
  const turns = [turn("a", [1, 2], [3]), turn("b", [4], [5, 6]), turn("c", [7], [8])];

  it("ends with the answer and tells where it begins", () => {
    expect(pathTokens(turns, "b")).toEqual({ ids: [1, 2, 3, 4, 5, 6], start: 4 });
  });

  it("forgets what a turn replaced", () => {
    const rewritten = [turns[0]!, turn("b", [9, 9], [5], { replaces_history: true }), turns[2]!];
    expect(pathTokens(rewritten, "c")).toEqual({ ids: [9, 9, 5, 7, 8], start: 4 });
  });

  it("has nothing for a turn of another branch, or one that runs", () => {
    expect(pathTokens(turns, "x")).toBeNull();
    expect(pathTokens([turn("a", [1], [2], { status: "running" })], "a")).toBeNull();
  });
});

describe("spanAround", () => {
  it("is everything where everything fits", () => {
    expect(spanAround(512, 3, 512)).toEqual({ from: 0, to: 512 });
  });

  it("holds the token, is never longer than the limit, and has as much before it as it can", () => {
    for (let index = 0; index < 1300; index++) {
      const { from, to } = spanAround(1300, index, 512);
      expect(from).toBeLessThanOrEqual(index);
      expect(to).toBeGreaterThan(index);
      expect(to).toBeLessThanOrEqual(1300);
      expect(to - from).toBeLessThanOrEqual(512);
      expect(index - from).toBeGreaterThanOrEqual(Math.min(index, 512 - 64));
    }
  });

  it("is the same for neighbours, so that few requests are made", () => {
    const spans = new Set(
      Array.from({ length: 1300 }, (_, index) => JSON.stringify(spanAround(1300, index, 512))),
    );
    expect(spans.size).toBeLessThan(25);
  });
});

describe("layersFor", () => {
  it("is all of them for a short text", () => {
    expect(layersFor(100, 30)).toEqual(Array.from({ length: 30 }, (_, i) => i));
    expect(layersFor(1, 1)).toEqual([0]);
  });

  it("is some for a long one, each once, from the first to the last", () => {
    for (const blocks of [1, 2, 9, 10, 11, 30, 80]) {
      const layers = layersFor(500, blocks);
      expect(layers.length).toBe(Math.min(10, blocks));
      expect(new Set(layers).size).toBe(layers.length);
      expect(layers[0]).toBe(0);
      expect(layers[layers.length - 1]).toBe(blocks - 1);
    }
  });
});

const forward: Forward = {
  tokens: ["S", "arah", " fed"].map((text, id) => ({ id, text, bytes: [], special: false })),
  shapes: { input_ids: [1, 3], hidden: [1, 3, 4], logits: [1, 3, 9] },
  positions: [
    {
      position: 0,
      entropy: 1,
      top: [{ id: 1, text: "arah", logit: 3, prob: 0.5 }],
      next: { id: 1, prob: 0.5, logprob: Math.log(0.5), rank: 1 },
    },
    {
      position: 1,
      entropy: 2,
      top: [{ id: 7, text: " was", logit: 2, prob: 0.4 }],
      next: { id: 2, prob: 0.125, logprob: Math.log(0.125), rank: 3 },
    },
    { position: 2, entropy: 3, top: [], next: null },
  ],
};

describe("seenTokens", () => {
  const tokens = seenTokens(forward, 10, 11);

  it("puts beside each token what was expected in its place", () => {
    expect(tokens.map(({ index, answer }) => [index, answer])).toEqual([
      [10, false],
      [11, true],
      [12, true],
    ]);
    expect(tokens[0]?.drawn).toBeNull();
    expect(tokens[1]?.drawn?.rank).toBe(1);
    expect(tokens[2]?.alternatives[0]?.text).toBe(" was");
    expect(tokens[2]?.entropy).toBe(2);
  });

  it("sums the answer up", () => {
    const seen = summary(tokens);
    expect(seen?.tokens).toBe(2);
    expect(seen?.notFirst).toBe(1);
    expect(seen?.perplexity).toBeCloseTo(4, 6); // 1 / sqrt(1/2 * 1/8)
    expect(summary(tokens.slice(0, 1))).toBeNull();
  });

  it("begins where the model's first choice was not drawn", () => {
    expect(firstSurprise(tokens, 11)).toBe(12);
    expect(firstSurprise(tokens.slice(0, 2), 11)).toBe(11);
  });
});

it("finds the example in a text, and only there", () => {
  const text = ["\n", "Sarah", " fed", " the", " cat", " because", " it", "."];
  const said = (texts: string[]) =>
    texts.map((text, i) => ({ ...tokenOf(text), index: 7 + i }));
  expect(exampleIt(said(text))).toBe(13);
  expect(exampleIt(said(text.slice(0, 6)))).toBeNull();
  expect(exampleIt(said([" it"]))).toBeNull();
});

const tokenOf = (text: string) => ({ ...seenTokens(forward, 0, 0)[0]!, text });

it("names the penalties that are set", () => {
  expect(penalties({})).toEqual([]);
  expect(penalties({}, { repetition_penalty: 1.1, temperature: 0.2 })).toEqual([
    "repetition penalty 1.1",
  ]);
  expect(
    penalties({ repetition_penalty: 1, frequency_penalty: -0.5 }, { repetition_penalty: 1.1 }),
  ).toEqual(["frequency penalty -0.5"]);
});

it("looks elsewhere one thing at a time", () => {
  const before = firstLook(5);
  expect(look(before, { do: "select", index: 7 })).toEqual({ ...before, selected: 7 });
  expect(look(before, { do: "view", view: "lens" })).toEqual({ ...before, view: "lens" });
  expect(look(before, { do: "layer", layer: 3 })).toEqual({ ...before, layer: 3 });
  expect(look(before, { do: "head", head: 2 })).toEqual({ ...before, head: 2 });
  expect(look(before, { do: "measure", measure: "scores" })).toEqual({
    ...before,
    measure: "scores",
  });
  expect(look(before, { do: "skipFirst", skipFirst: false }).skipFirst).toBe(false);
});
