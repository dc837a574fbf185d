/** Follows one answer's stream to its end, through lost connections, sleep and restarts. */

import { ApiError, frames } from "../api/client";
import { readStream } from "../api/routes";
import type { SseFrame } from "../api/sse";
import type { StreamEvent } from "../api/types";
import type { Facts, Told } from "./live";
import type { Action, State } from "./state";
import type { Store } from "./store";

/** Deltas come up to a few hundred times a second; the page is drawn at most this often. */
const DRAW_MS = 33;
const BACK_OFF_MS = [250, 500, 1000, 2000, 4000, 8000];

export class Follower {
  readonly #store: Store<State, Action>;
  readonly #missed: (session: string) => void;
  #reading: AbortController | null = null;
  #told: Told[] = [];
  #drawing: ReturnType<typeof setTimeout> | null = null;

  /** `missed`: the stream is gone before its end was seen. */
  constructor(store: Store<State, Action>, missed: (session: string) => void) {
    this.#store = store;
    this.#missed = missed;
  }

  /** Follow the live answer `generation`, from `response` or from the place where it is. */
  follow(generation: string, response: Response | null): void {
    this.leave();
    const reading = (this.#reading = new AbortController());
    void this.#follow(generation, response, reading.signal);
  }

  /** Stop reading; the answer goes on. */
  leave(): void {
    this.#reading?.abort();
    this.#reading = null;
    this.#told = [];
    if (this.#drawing !== null) clearTimeout(this.#drawing);
    this.#drawing = null;
  }

  /** What a generation that ended told at its end; null where that is past telling. */
  async recall(generation: string, numTokens: number): Promise<Facts | null> {
    const signal = AbortSignal.timeout(5000);
    const response = await readStream(generation, 1 + numTokens, signal);
    if (response.status === 204) return null;
    for await (const batch of frames(response)) {
      for (const { event } of toldIn(batch)) {
        if (event.event === "done") {
          const { finish_reason: finishReason, usage, timings } = event.data;
          return { finishReason, usage, timings };
        }
      }
    }
    return null;
  }

  async #follow(generation: string, first: Response | null, signal: AbortSignal): Promise<void> {
    let response = first;
    for (let failures = 0; !signal.aborted;) {
      try {
        const after = this.#store.get().live?.place ?? 0;
        response ??= await readStream(generation, after, signal);
        if (response.status === 204) break; // it ended, and this place is beyond its end
        const before = this.#store.get().live?.place;
        if (await this.#read(generation, response, signal)) return;
        if (this.#store.get().live?.place !== before) failures = 0;
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof ApiError && [401, 404].includes(error.status)) break;
      }
      response = null;
      if (signal.aborted) return;
      this.#draw(generation);
      this.#store.dispatch({ type: "phase", generation, phase: "lost" });
      await pause(BACK_OFF_MS[Math.min(failures++, BACK_OFF_MS.length - 1)] ?? 8000, signal);
    }
    if (signal.aborted) return;
    const session = this.#store.get().live?.session;
    this.#store.dispatch({ type: "left", generation });
    if (session !== undefined) this.#missed(session);
  }

  /** Whether the stream came to its end. */
  async #read(generation: string, response: Response, signal: AbortSignal): Promise<boolean> {
    this.#store.dispatch({ type: "phase", generation, phase: this.#phaseNow() });
    for await (const batch of frames(response)) {
      if (signal.aborted) return true;
      for (const frame of batch) {
        if (frame.kind === "comment" && frame.text.includes("restarted")) {
          this.#draw(generation);
          this.#store.dispatch({ type: "phase", generation, phase: "paused" });
        }
      }
      const told = toldIn(batch);
      const end = told.find(({ event }) => event.event === "done" || event.event === "error");
      const drained =
        end?.event.event === "error" && end.event.data.error.code === "server_draining";
      this.#told.push(...told.filter((one) => !drained || one !== end));
      if (drained) return false; // the answer goes on after the restart
      if (end !== undefined) {
        this.#draw(generation);
        return true;
      }
      if (this.#told.length > 0)
        this.#drawing ??= setTimeout(() => this.#draw(generation), DRAW_MS);
    }
    return false;
  }

  /** What a connection that is there again shows until its next event. */
  #phaseNow() {
    const live = this.#store.get().live;
    if (live === null || live.phase !== "lost") return live?.phase ?? "sent";
    return live.tokens > 0 ? "streaming" : "sent";
  }

  #draw(generation: string): void {
    if (this.#drawing !== null) clearTimeout(this.#drawing);
    this.#drawing = null;
    const events = this.#told;
    if (events.length === 0) return;
    this.#told = [];
    this.#store.dispatch({ type: "told", generation, events, now: Date.now() });
  }
}

/** The events among the frames. One that this page does not know is passed over. */
export function toldIn(batch: readonly SseFrame[]): Told[] {
  const told: Told[] = [];
  for (const frame of batch) {
    if (frame.kind !== "event") continue;
    if (!["progress", "start", "delta", "done", "error"].includes(frame.event)) continue;
    const event = { event: frame.event, data: JSON.parse(frame.data) as unknown } as StreamEvent;
    told.push({ id: frame.id === null ? null : Number(frame.id), event });
  }
  return told;
}

/** Wait; less where the network comes back or the page is looked at again. */
function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      document.removeEventListener("visibilitychange", done);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    addEventListener("online", done);
    document.addEventListener("visibilitychange", done);
    signal.addEventListener("abort", done);
  });
}
