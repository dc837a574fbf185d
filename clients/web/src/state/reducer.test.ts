import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { SseDecoder } from "../api/sse";
import type { Session, Turn } from "../api/types";
import { toldIn } from "./follower";
import { isOver, newLive, speedOf, toldLive, type Live, type Told } from "./live";
import { liveTurn, reduce } from "./reducer";
import { emptyState, type Action, type State } from "./state";
import { textOf } from "./tree";
import { unsaid } from "./words";

const told: Told[] = toldIn(
  new SseDecoder().feed(
    new Uint8Array(readFileSync(new URL("../api/recorded/answer.sse", import.meta.url))),
  ),
);
const [GEN, TURN] = [
  "gen_f7800caa7679150d175d6c7ae621b997",
  "turn_45a60e48f107a1f20da66738f7046fbf",
];

const session = (id: string, fields: Partial<Session> = {}): Session => ({
  id,
  title: id,
  instructions: null,
  metadata: {},
  defaults: {},
  overflow: "error",
  head: null,
  model: "m",
  generating: null,
  created_at: 0,
  updated_at: 0,
  ...fields,
});

const turn = (id: string, parent: string | null, fields: Partial<Turn> = {}): Turn => ({
  id,
  session: "sess_a",
  parent,
  role: "user",
  content: [{ type: "text", text: id }],
  status: "complete",
  finish_reason: null,
  generation: null,
  num_tokens: 1,
  created_at: 0,
  ...fields,
});

const after = (...actions: Action[]): State =>
  actions.reduce(reduce, emptyState({ instructions: "", overflow: "error", defaults: {} }));

const running = turn(TURN, "turn_q", {
  role: "assistant",
  status: "running",
  generation: GEN,
  content: [{ type: "text", text: "" }],
});
const opened: Action = {
  type: "opened",
  session: session("sess_a"),
  turns: [turn("turn_q", null)],
};
const live: Action = { type: "live", live: newLive("sess_a", GEN, 1000) };
const tree: Action = {
  type: "tree",
  session: "sess_a",
  head: TURN,
  turns: [turn("turn_q", null), running],
};
const events = (some: Told[], now = 2000): Action => ({
  type: "told",
  generation: GEN,
  events: some,
  now,
});
const pending: Action = {
  type: "pending",
  pending: {
    key: "k",
    request: { kind: "turns", input: "Hello" },
    parent: null,
    text: "Hello",
    error: null,
  },
};
const answerOf = (state: State) => textOf(state.open?.turns[TURN] as Turn);
const whole = told.map(({ event }) => (event.event === "delta" ? event.data.text : "")).join("");

describe("an answer's stream", () => {
  const fresh = newLive("sess_a", GEN, 1000);

  test("is the same in one step and event by event", () => {
    const atOnce = toldLive(fresh, told, 2000);
    const slowly = told.reduce<Live>((state, one) => toldLive(state, [one], 2000), fresh);
    expect(atOnce).toEqual(slowly);
    expect(atOnce).toMatchObject({ phase: "done", text: whole, tokens: 43, turn: TURN });
    expect(atOnce.facts?.usage.completion_tokens).toBe(43);
  });

  test("that is read again from the middle on shows nothing twice", () => {
    for (let cut = 0; cut <= told.length; cut++) {
      const first = toldLive(fresh, told.slice(0, cut), 2000);
      expect(toldLive(first, told, 3000).text).toBe(whole);
    }
  });

  test("of an answer that was found on the way adds to what it had", () => {
    const cut = told.findIndex(({ id }) => id === 12);
    const base = told
      .slice(1, cut)
      .map(({ event }) => (event.data as { text: string }).text)
      .join("");
    const found = newLive("sess_a", GEN, 0, { turn: TURN, base, tokens: 8, place: 9 });
    const end = toldLive(found, told, 2000);
    expect(end.base + end.text).toBe(whole);
    expect(end.tokens).toBe(43);
  });

  test("tells its place in the queue, then how much of the prompt is read, then writes", () => {
    const at = (event: Told["event"], state = fresh) => toldLive(state, [{ id: null, event }], 1);
    const queued = at({ event: "progress", data: { queue_position: 3 } });
    expect(queued).toMatchObject({ phase: "queued", queuePosition: 3 });
    const reading = at({ event: "progress", data: { prefill: { done: 64, total: 512 } } }, queued);
    expect(reading).toMatchObject({ phase: "prefill", queuePosition: null });
    expect(reading.prefill).toEqual({ done: 64, total: 512 });
    expect(toldLive(reading, told.slice(0, 2), 2).phase).toBe("streaming");
  });

  test("that is being stopped says so until its end", () => {
    const stopping: Live = { ...fresh, phase: "stopping" };
    expect(toldLive(stopping, told.slice(0, 3), 1).phase).toBe("stopping");
    expect(toldLive(stopping, told, 1).phase).toBe("done");
  });

  test("changes nothing after its end", () => {
    const end = toldLive(fresh, told, 2000);
    expect(isOver(end)).toBe(true);
    const more: Told = { id: 99, event: { event: "delta", data: { text: "x", token_ids: [1] } } };
    expect(toldLive(end, [more], 3000)).toBe(end);
  });

  test("has a speed once there are two moments, without the tokens of the first", () => {
    const first = toldLive(fresh, told.slice(0, 2), 2000);
    expect(speedOf(first)).toBeNull();
    const later = toldLive(first, told.slice(2, 9), 2500);
    expect(speedOf(later)).toBeCloseTo((1000 * (later.tokens - 1)) / 500);
  });
});

describe("an answer that ends", () => {
  test("becomes a turn, whether the tree comes before, between or after its events", () => {
    const cut = 10;
    const orders: Action[][] = [
      [opened, live, tree, events(told)],
      [opened, live, events(told.slice(0, cut)), tree, events(told.slice(cut))],
      [opened, live, events(told), tree],
    ];
    for (const order of orders) {
      const state = after(...order);
      expect(state.live).toBeNull();
      expect(answerOf(state)).toBe(whole);
      expect(state.open?.turns[TURN]).toMatchObject({ status: "complete", finish_reason: "stop" });
      expect(state.facts[TURN]?.timings.ttft_ms).toBe(74.9);
      expect(state.pathTokens).toBe(78);
      expect(state.open?.session.generating).toBeNull();
    }
  });

  test("by an error keeps what was said, interrupted, and says why", () => {
    const error = { message: "the engine crashed", type: "server_error", code: "engine_crash" };
    const broken: Told = { id: null, event: { event: "error", data: { error } } };
    const state = after(opened, live, tree, events([...told.slice(0, 5), broken]));
    expect(answerOf(state)).toBe("Grüße");
    expect(state.open?.turns[TURN]).toMatchObject({
      status: "interrupted",
      finish_reason: "error",
    });
    expect(state.notices.map(({ text }) => text)).toEqual(["the engine crashed"]);
  });

  test("of another session's stream changes nothing here", () => {
    const before = after(opened, live, tree);
    expect(reduce(before, { ...events(told), generation: "gen_other" } as Action)).toBe(before);
  });
});

describe("what was said", () => {
  test("is pending until the tree has its answer", () => {
    const other: Action = { ...tree, turns: [turn("turn_q", null)], head: "turn_q" };
    expect(after(opened, pending, live, other).pending).not.toBeNull();
    expect(after(opened, pending, live, tree).pending).toBeNull();
  });

  test("and refused stays, with the reason; a late refusal of something else does not count", () => {
    const error = { message: "full", code: "queue_full", retryAt: 5 };
    const state = after(opened, pending, { type: "pendingFailed", key: "k", error });
    expect(state.pending).toMatchObject({ text: "Hello", error });
    const late = after(opened, pending, { type: "pendingFailed", key: "old", error });
    expect(late.pending?.error).toBeNull();
  });
});

describe("words that the server has not taken", () => {
  const refused: Action = {
    type: "pendingFailed",
    key: "k",
    error: { message: "full", code: "queue_full", retryAt: null },
  };
  const writes = (of: string, text: string | null): Action => ({ type: "words", of, text });
  const other: Action = { type: "opened", session: session("sess_b"), turns: [] };

  test("are in the field again, before what was written since", () => {
    const state = after(opened, pending, refused, { type: "gaveUp" });
    expect(state).toMatchObject({ pending: null, words: { sess_a: "Hello" } });
    const since = after(opened, pending, refused, writes("sess_a", "more"), { type: "gaveUp" });
    expect(since.words["sess_a"]).toBe("Hello\nmore");
  });

  test("stay with their session when another one is opened, or none", () => {
    for (const first of [[pending], [pending, refused]]) {
      const elsewhere: Action[] = [{ type: "opening", id: "sess_b" }, other, { type: "closed" }];
      for (const next of elsewhere) {
        const state = after(opened, ...first, next);
        expect(state).toMatchObject({ pending: null, words: { sess_a: "Hello" } });
      }
    }
    expect(after(pending, other).words).toEqual({ new: "Hello" });
  });

  test("wait on when their session is read again, also beside another window's answer", () => {
    expect(after(opened, pending, opened).pending?.text).toBe("Hello");
    const beside = after(opened, pending, refused, live, tree, opened);
    expect(beside).toMatchObject({ pending: { text: "Hello" }, words: {}, live: null });
  });

  test("are not put back once its answer is there", () => {
    for (const next of [opened, other, { type: "closed" } as const]) {
      expect(after(opened, pending, live, next)).toMatchObject({ pending: null, words: {} });
    }
  });

  test("are kept over a reload of the page until the server has them", () => {
    expect(unsaid(after(opened, pending))).toEqual({ sess_a: "Hello" });
    expect(unsaid(after(opened, pending, refused))).toEqual({ sess_a: "Hello" });
    expect(unsaid(after(opened, pending, live))).toEqual({});
  });

  test("go where their session goes, when it is made for them", () => {
    const { pending: asked } = after(pending);
    const fresh = session("sess_a");
    const made: Action = { type: "opened", session: fresh, turns: [], pending: asked! };
    const state = after(pending, writes("new", "next"), made);
    expect(state).toMatchObject({ pending: asked, words: { sess_a: "next", new: "" } });
  });

  test("are out of the field once the server is known to have them", () => {
    const said: Action = { type: "said", of: "sess_a", text: "Hello" };
    expect(after(writes("sess_a", "Hello"), said).words["sess_a"]).toBe("");
    expect(after(writes("sess_a", "Hello there"), said).words["sess_a"]).toBe("Hello there");
  });

  test("go with whoever signs out", () => {
    const draft = { instructions: "", overflow: "error", defaults: {} } as const;
    const state = after(opened, pending, writes("new", "x"), { type: "forgotten", draft });
    expect(state).toEqual(emptyState(draft));
    expect(after(writes("turn_q", "x"), writes("turn_q", null)).words).toEqual({});
  });
});

describe("sessions", () => {
  const page = (query: string, ids: string[], appended = false): Action => ({
    type: "listed",
    query,
    sessions: ids.map((id) => session(id)),
    more: false,
    appended,
  });
  const ids = (state: State) => state.sessions.map(({ id }) => id);

  test("pages are put together, and none is there twice", () => {
    const state = after(page("", ["a", "b"]), page("", ["b", "c"], true));
    expect(ids(state)).toEqual(["a", "b", "c"]);
  });

  test("an answer to an earlier search is passed over", () => {
    const state = after({ type: "query", query: "new" }, page("old", ["a"]), page("new", ["b"]));
    expect(ids(state)).toEqual(["b"]);
  });

  test("say which of them are answering, in the list too", () => {
    const state = after(page("", ["sess_a", "b"]), opened, live);
    expect(state.sessions.map(({ generating }) => generating)).toEqual([GEN, null]);
    expect(liveTurn(after(opened, live, tree).open!.turns, newLive("sess_a", GEN, 0))?.id).toBe(
      TURN,
    );
  });

  test("a list that comes while one reads does not move the head", () => {
    const fresh = page("", ["sess_a"]);
    const state = after(opened, tree, fresh);
    expect(state.open?.session.head).toBe(TURN);
  });

  test("what is deleted can be had back", () => {
    const state = after(
      page("", ["a"]),
      { type: "deleted", id: "a" },
      { type: "undeleted", id: "a" },
    );
    expect(state.deleted).toEqual([]);
  });
});
