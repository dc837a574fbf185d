/** An answer that is being written, as its stream tells it. Pure. */

import type { StreamEvent, Tiers, Timings, Usage, WireError } from "../api/types";

/** `lost`: the connection is gone and is being made again; the answer goes on meanwhile. `paused`:
 * the engine is being restarted. */
export type Phase =
  "sent" | "queued" | "prefill" | "streaming" | "paused" | "lost" | "stopping" | "done" | "failed";

export interface Live {
  session: string;
  generation: string;
  turn: string | null;
  phase: Phase;
  /** The text before this stream: what a continued answer, or one found on the way, had. */
  base: string;
  text: string;
  /** Output tokens of the answer up to here, those of `base` among them. */
  tokens: number;
  /** The id of the last event: where a reader that comes back goes on. */
  place: number;
  queuePosition: number | null;
  prefill: { done: number; total: number } | null;
  promptTokens: number | null;
  cached: Tiers | null;
  /** Milliseconds, by the clock of the actions. */
  sentAt: number;
  firstAt: number | null;
  /** Tokens that came with the first delta: they are no measure of speed. */
  firstTokens: number;
  lastAt: number | null;
  streamed: number;
  error: WireError | null;
  facts: Facts | null;
}

/** What is known of an answer once it has ended. */
export interface Facts {
  finishReason: string;
  usage: Usage;
  timings: Timings;
}

export interface Told {
  id: number | null;
  event: StreamEvent;
}

export function newLive(
  session: string,
  generation: string,
  now: number,
  found?: { turn: string; base: string; tokens: number; place: number },
): Live {
  return {
    session,
    generation,
    turn: found?.turn ?? null,
    phase: "sent",
    base: found?.base ?? "",
    text: "",
    tokens: found?.tokens ?? 0,
    place: found?.place ?? 0,
    queuePosition: null,
    prefill: null,
    promptTokens: null,
    cached: null,
    sentAt: now,
    firstAt: null,
    firstTokens: 0,
    lastAt: null,
    streamed: 0,
    error: null,
    facts: null,
  };
}

/** Tokens per second since the first one, as seen here; null until there are two moments. */
export function speedOf(live: Live): number | null {
  if (live.firstAt === null || live.lastAt === null || live.lastAt <= live.firstAt) return null;
  return (1000 * (live.streamed - live.firstTokens)) / (live.lastAt - live.firstAt);
}

export const isOver = (live: Live): boolean => live.phase === "done" || live.phase === "failed";

/** Events in their order, one after the other. What was seen already (an id not beyond the place)
 * changes nothing. */
export function toldLive(live: Live, events: readonly Told[], now: number): Live {
  return events.reduce((state, told) => toldOne(state, told, now), live);
}

function toldOne(live: Live, { id, event }: Told, now: number): Live {
  if (isOver(live) || (id !== null && id <= live.place)) return live;
  const place = id ?? live.place;
  const open: Phase = live.phase === "stopping" ? "stopping" : "streaming";
  switch (event.event) {
    case "progress": {
      if (live.phase === "stopping") return live;
      const { queue_position: position, prefill } = event.data;
      return prefill === undefined
        ? { ...live, phase: "queued", queuePosition: position ?? null }
        : { ...live, phase: "prefill", queuePosition: null, prefill };
    }
    case "start": {
      const { turn, prompt_tokens, cached_tokens } = event.data;
      const phase = live.phase === "stopping" ? "stopping" : "prefill";
      return {
        ...live,
        phase,
        place,
        turn: turn ?? live.turn,
        promptTokens: prompt_tokens,
        cached: cached_tokens,
        queuePosition: null,
      };
    }
    case "delta": {
      const count = event.data.token_ids.length;
      const first = live.firstAt === null;
      return {
        ...live,
        phase: open,
        place,
        text: live.text + event.data.text,
        tokens: live.tokens + count,
        streamed: live.streamed + count,
        firstAt: live.firstAt ?? now,
        firstTokens: first ? count : live.firstTokens,
        lastAt: now,
        prefill: null,
      };
    }
    case "done": {
      const { finish_reason: finishReason, usage, timings, turn } = event.data;
      return {
        ...live,
        phase: "done",
        place,
        tokens: live.tokens + Math.max(place - live.place - 1, 0), // one that is not shown, the end
        turn: turn ?? live.turn,
        facts: { finishReason, usage, timings },
      };
    }
    case "error":
      return { ...live, phase: "failed", error: event.data.error };
  }
}
