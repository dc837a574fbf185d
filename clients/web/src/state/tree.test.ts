import { expect, test } from "vitest";
import type { Turn } from "../api/types";
import { childrenOf, newestLeaf, pathTo } from "./tree";

const PARENTS: Record<string, string | null> = { a: null, b: "a", c: "b", d: "a", e: "d", f: null };
const turns = Object.fromEntries(
  Object.entries(PARENTS).map(([id, parent]) => [id, { id, parent } as Turn]),
);
const ids = (head: string | null) => pathTo(turns, head).map(({ id }) => id);

test("the path goes from the root to the head", () => {
  expect(ids("c")).toEqual(["a", "b", "c"]);
  expect(ids("e")).toEqual(["a", "d", "e"]);
  expect(ids(null)).toEqual([]);
  expect(ids("unknown")).toEqual([]);
});

test("a loop, which the server never makes, ends", () => {
  const loop = { a: { id: "a", parent: "b" } as Turn, b: { id: "b", parent: "a" } as Turn };
  expect(pathTo(loop, "a").length).toBeLessThan(5);
});

test("children are in the order in which they were made, roots under no name", () => {
  const children = childrenOf(turns);
  expect(children.get("")).toEqual(["a", "f"]);
  expect(children.get("a")).toEqual(["b", "d"]);
});

test("a branch is followed to its newest end", () => {
  const children = childrenOf(turns);
  expect(newestLeaf(children, "a")).toBe("e");
  expect(newestLeaf(children, "b")).toBe("c");
  expect(newestLeaf(children, "f")).toBe("f");
});
