import { expect, test } from "vitest";
import { blocksOf, definitionsShown } from "./blocks";

test.each([
  ["paragraphs", "one\ntwo\n\nthree\n", ["one\ntwo\n\n", "three\n"]],
  [
    "a fence with empty lines",
    "a\n\n```js\n\nb\n\n```\n\nc",
    ["a\n\n", "```js\n\nb\n\n```\n\n", "c"],
  ],
  ["a fence that is open still", "```\na\n\nb", ["```\na\n\nb"]],
  ["a fence within a longer one", "````\n```\n\n```\n\n````\n", ["````\n```\n\n```\n\n````\n"]],
  ["a loose list", "1. a\n\n2. b\n\nend", ["1. a\n\n2. b\n\n", "end"]],
  ["a list item's second paragraph", "- a\n\n  more\n\nend", ["- a\n\n  more\n\n", "end"]],
  ["a list after a paragraph", "intro\n\n- a", ["intro\n\n", "- a"]],
  ["nothing", "", []],
])("%s", (_, text, blocks) => {
  expect(blocksOf(text)).toEqual(blocks);
});

test("as a text grows, pieces but the last one stay what they are", () => {
  const text =
    "Dear Sarah,\n\n1. one\n\n2. two\n\n```py\nx = 1\n\ny\n```\n\n| a |\n|---|\n| b |\n\nEnd.";
  const whole = blocksOf(text);
  for (let end = 1; end <= text.length; end++) {
    const grown = blocksOf(text.slice(0, end));
    expect(grown.join("")).toBe(text.slice(0, end));
    // A list that may go on is not cut off before it is known that it does not.
    expect(grown.slice(0, -1)).toEqual(whole.slice(0, grown.length - 1));
  }
});

test("definitions that stand alone are shown as they were written", () => {
  expect(definitionsShown("[^1]: The note.\n[2]: http://a.b\n")).toBe(
    "\\[^1]: The note.\n\\[2]: http://a.b\n",
  );
  for (const other of ["See [^1].", "a [b]: c", "[x] done", "```\n[a]: b\n```"]) {
    expect(definitionsShown(other)).toBe(other);
  }
});
