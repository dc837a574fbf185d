import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { SseDecoder, type SseFrame } from "./sse";

/** Streams that the real server sent; the engine was killed in the middle of the second one. */
const recorded = (name: string) =>
  new Uint8Array(readFileSync(new URL(`./recorded/${name}.sse`, import.meta.url)));
const encode = (text: string) => new TextEncoder().encode(text);

function decode(bytes: Uint8Array, size = bytes.length): SseFrame[] {
  const decoder = new SseDecoder();
  const frames: SseFrame[] = [];
  for (let at = 0; at < bytes.length; at += size) {
    frames.push(...decoder.feed(bytes.subarray(at, at + size)));
  }
  return frames;
}

const textOf = (frames: SseFrame[]) =>
  frames
    .flatMap((frame) => (frame.kind === "event" && frame.event === "delta" ? [frame.data] : []))
    .map((data) => (JSON.parse(data) as { text: string }).text)
    .join("");

describe("what the real server sent", () => {
  test("is read whole", () => {
    const frames = decode(recorded("answer"));
    expect(textOf(frames)).toMatch(
      /^Grüße aus dem Bach 🌊 — 川は流れる\.\n\nÄhem: [a-z ]{20,40}!$/,
    );
    expect(frames[0]).toMatchObject({ kind: "event", event: "start", id: "1" });
    expect(frames.at(-1)).toMatchObject({ kind: "event", event: "done", id: "45" });
  });

  test("says in a comment that the engine died, and goes on with the next id", () => {
    const frames = decode(recorded("paused"));
    const pause = frames.findIndex((frame) => frame.kind === "comment");
    expect(frames[pause]).toEqual({ kind: "comment", text: "the engine is being restarted" });
    const ids = frames.flatMap((frame) => (frame.kind === "event" ? [Number(frame.id)] : []));
    expect(ids).toEqual([...ids].sort((a, b) => a - b));
    expect(pause).toBeGreaterThan(1);
    expect(pause).toBeLessThan(frames.length - 2);
  });

  test.each([1, 2, 3, 5, 7, 64])("is the same in pieces of %i bytes", (size) => {
    for (const name of ["answer", "paused"]) {
      expect(decode(recorded(name), size)).toEqual(decode(recorded(name)));
    }
  });
});

describe("the standard", () => {
  test.each(["\n", "\r\n", "\r"])("lines may end in %j, in any pieces", (end) => {
    const bytes = encode(
      ["id: 7", "event: a", "data: x", "data: y", "", "data:z", "", ""].join(end),
    );
    for (const size of [1, 2, 5, bytes.length]) {
      expect(decode(bytes, size)).toEqual([
        { kind: "event", event: "a", data: "x\ny", id: "7" },
        { kind: "event", event: "message", data: "z", id: null },
      ]);
    }
  });

  test("an event without data is none, and one without an end neither", () => {
    expect(decode(encode("event: a\n\nretry: 5\n\ndata: half"))).toEqual([]);
  });

  test("a byte order mark is no part of the first line", () => {
    expect(decode(encode("\uFEFFdata: x\n\n"), 1)).toHaveLength(1);
  });

  test("the last id is kept for a reader that comes back", () => {
    const decoder = new SseDecoder();
    decoder.feed(encode("id: 12\ndata: x\n\ndata: y\n\nid: 1\0\ndata: z\n\n"));
    expect(decoder.lastEventId).toBe("12");
  });

  test("only one space after the colon goes", () => {
    expect(decode(encode("data:  x\n\n: ping\n"))).toEqual([
      { kind: "event", event: "message", data: " x", id: null },
      { kind: "comment", text: "ping" },
    ]);
  });
});
