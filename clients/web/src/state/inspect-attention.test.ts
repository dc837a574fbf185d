import { describe, expect, it } from "vitest";

import {
  byColumn,
  columns,
  MAX_COLUMNS,
  queriesAround,
  strengths,
  strongest,
} from "./inspect-attention";

describe("columns", () => {
  it("has one for each key where they fit", () => {
    expect(columns(3)).toEqual([
      { from: 0, to: 1 },
      { from: 1, to: 2 },
      { from: 2, to: 3 },
    ]);
    expect(columns(MAX_COLUMNS)).toHaveLength(MAX_COLUMNS);
  });

  it("covers every key once where they do not", () => {
    const cols = columns(300);
    expect(cols).toHaveLength(MAX_COLUMNS);
    expect(
      cols.flatMap(({ from, to }) => Array.from({ length: to - from }, (_, i) => from + i)),
    ).toEqual(Array.from({ length: 300 }, (_, i) => i));
    expect(cols[0]).toEqual({ from: 0, to: 1 });
  });
});

describe("byColumn", () => {
  const cols = [
    { from: 0, to: 1 },
    { from: 1, to: 3 },
    { from: 3, to: 4 },
    { from: 4, to: 5 },
  ];

  it("adds weights up, so that the row still sums to 1", () => {
    const row = byColumn([0.5, 0.2, 0.1, 0.2], cols, true);
    expect(row[1]).toBeCloseTo(0.3, 12);
    expect(row[3]).toBeNull();
    expect(row.reduce<number>((sum, value) => sum + (value ?? 0), 0)).toBeCloseTo(1, 12);
  });

  it("takes the largest of scores", () => {
    expect(byColumn([1, -3, -2, 4], cols, false)).toEqual([1, -2, 4, null]);
  });
});

describe("strengths", () => {
  it("goes from nothing to the largest weight", () => {
    expect(strengths([0.5, 0.25, null], true, false)).toEqual([1, 0.5, null]);
  });

  it("leaves the first token out, and measures by the others", () => {
    expect(strengths([0.9, 0.05, 0.1], true, true)).toEqual([null, 0.5, 1]);
  });

  it("goes from the smallest score to the largest", () => {
    expect(strengths([-2, 0, 2], false, false)).toEqual([0, 0.5, 1]);
  });

  it("does not let many tokens together outshine single ones", () => {
    const cols = columns(300).slice(0, 4);
    expect(strengths([0.1, 0.8, 0.05, 0.2], true, false, cols)).toEqual([0.5, 1, 0.25, 1]);
  });

  it("stands a row of one key, and none", () => {
    expect(strengths([1], true, true)).toEqual([null]);
    expect(strengths([1], true, false)).toEqual([1]);
    expect(strengths([], true, false)).toEqual([]);
  });
});

it("finds the strongest keys", () => {
  expect(strongest([0.9, 0.1, 0.4, 0.2], 2, true)).toEqual([
    { key: 2, value: 0.4 },
    { key: 3, value: 0.2 },
  ]);
  expect(strongest([0.9, 0.1], 5, false).map(({ key }) => key)).toEqual([0, 1]);
});

it("maps rows around the token, never beyond the text", () => {
  for (const length of [1, 9, 40, 512]) {
    for (let selected = 0; selected < length; selected++) {
      const queries = queriesAround(length, selected);
      expect(queries).toContain(selected);
      expect(queries.length).toBeLessThanOrEqual(32);
      expect(queries[queries.length - 1]).toBeLessThan(length);
    }
  }
});
