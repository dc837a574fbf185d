/** What the page does: it asks the server, and tells the store. The only place with both. */

import { ApiError, newKey } from "../api/client";
import * as routes from "../api/routes";
import type { Sampling, Tree } from "../api/types";
import { Follower } from "./follower";
import { newLive, type Live } from "./live";
import { reduce } from "./reducer";
import { SessionList } from "./sessions";
import { emptyState, type Action, type Draft, type Pending, type State } from "./state";
import { createStore, type Store } from "./store";
import { childrenOf, newestLeaf, textOf } from "./tree";
import { Troubles } from "./troubles";
import { NEW } from "./words";

const MAX_TRIES = 6;
const STOP_MS = 10_000;
const TREE_MS = 1000;

/** Where a continued answer stands. */
type Found = NonNullable<Parameters<typeof newLive>[3]>;

export class Chat {
  readonly store: Store<State, Action>;
  readonly sessions: SessionList;
  readonly troubles: Troubles;
  readonly #follower: Follower;
  #sending: AbortController | null = null;
  #opening: Promise<boolean> = Promise.resolve(true);
  #tries = 0;
  #continued: { key: string; found: Found } | null = null;
  readonly #forget: () => Draft;

  /** `forget`: what this browser keeps of whoever signs out goes; how new sessions begin then. */
  constructor(draft: Draft, forget: () => Draft) {
    this.#forget = forget;
    this.store = createStore(reduce, emptyState(draft));
    this.troubles = new Troubles(this.store, () => this.#shutOut());
    this.sessions = new SessionList(
      this.store,
      this.troubles,
      (session) => void this.reload(session),
    );
    this.#follower = new Follower(this.store, (session) => void this.reload(session));
  }

  /** Ask for the model; what opens the door. */
  async enter(): Promise<void> {
    try {
      const { data } = await routes.models();
      if (data[0] !== undefined) this.store.dispatch({ type: "model", model: data[0] });
      await this.sessions.list(this.store.get().query);
    } catch (error) {
      if (error instanceof ApiError && error.status === 0) {
        this.store.dispatch({ type: "door", door: "unreachable" });
      } else {
        this.troubles.tell(error);
      }
    }
  }

  async signIn(key: string): Promise<void> {
    await routes.login(key);
    await this.enter();
  }

  async signOut(): Promise<void> {
    const left = await this.troubles.guarded(() => routes.logout());
    if (left === null && this.store.get().door !== "out") return;
    this.#shutOut();
    this.store.dispatch({ type: "forgotten", draft: this.#forget() });
    this.store.dispatch({ type: "door", door: "out" });
  }

  // ------------------------------------------------------------------------------- sessions

  /** Show a session, and read on where an answer is being written. False where it cannot be. */
  open(id: string): Promise<boolean> {
    this.#leave();
    this.store.dispatch({ type: "opening", id });
    this.#opening = this.#fetch(id).then(
      () => true,
      (error: unknown) => {
        if (this.store.get().opening !== id) return true; // another one was asked for
        this.store.dispatch({ type: "closed" });
        if (this.troubles.isShutOut(error)) return true; // it is opened once one has signed in
        this.troubles.tell(error);
        return false;
      },
    );
    return this.#opening;
  }

  /** Fetch the open session again: something happened that was not seen. */
  async reload(id: string): Promise<void> {
    if (this.store.get().open?.session.id !== id) return;
    await this.troubles.guarded(() => this.#fetch(id, true));
  }

  close(): void {
    this.#leave();
    this.store.dispatch({ type: "closed" });
  }

  /** A new session that begins as this one does up to `turn`. */
  async fork(turn: string): Promise<string | null> {
    const open = this.store.get().open;
    if (open === null) return null;
    return this.troubles.guarded(async () => {
      const fork = await routes.forkSession(open.session.id, turn);
      const session = await routes.nameFork(fork);
      this.store.dispatch({ type: "session", session });
      return session.id;
    });
  }

  async setDefaults(defaults: Sampling): Promise<void> {
    const { open, draft } = this.store.get();
    if (open === null) {
      this.store.dispatch({ type: "draft", draft: { ...draft, defaults } });
      return;
    }
    await this.troubles.guarded(async () => {
      const session = await routes.changeSession(open.session.id, { defaults });
      this.store.dispatch({ type: "session", session });
    });
  }

  // -------------------------------------------------------------------------------- answers

  /** Say something: after the head, or after `parent` (which makes another branch). */
  async send(text: string, parent?: string | null): Promise<void> {
    const wanted = this.store.get().opening;
    if (wanted !== null) await this.#opening;
    const { open } = this.store.get();
    if (wanted !== null && open?.session.id !== wanted) {
      this.store.dispatch({ type: "putBack", of: wanted, text });
      return;
    }
    const request: routes.AnswerRequest =
      parent === undefined
        ? { kind: "turns", input: text }
        : { kind: "turns", input: text, parent };
    const after = parent === undefined ? (open?.session.head ?? null) : parent;
    await this.#ask({ key: newKey(), request, parent: after, text, error: null });
  }

  /** Another answer beside `turn`. */
  async regenerate(turn: string): Promise<void> {
    const known = this.store.get().open?.turns[turn];
    if (known === undefined) return;
    const parent = known.role === "assistant" ? known.parent : known.id;
    const request = { kind: "regenerate", turn } as const;
    await this.#ask({ key: newKey(), request, parent, text: null, error: null });
  }

  /** Go on with the answer `turn`, which is the head. */
  async goOn(turn: string): Promise<void> {
    const limit = this.store.get().open?.session.defaults.max_tokens;
    const request = {
      kind: "continue",
      ...(limit === undefined ? {} : { max_tokens: limit }),
    } as const;
    await this.#ask({ key: newKey(), request, parent: turn, text: null, error: null });
  }

  /** The same request again; it makes one answer however often it is sent. */
  async retry(): Promise<void> {
    const { pending, open, live } = this.store.get();
    if (pending === null || (live !== null && pending.error?.code === "session_busy")) return;
    const { request } = pending;
    const atHead = request.kind === "turns" && request.parent === undefined;
    const parent = atHead ? (open?.session.head ?? null) : pending.parent;
    await this.#ask({ ...pending, parent, error: null }, true);
  }

  /** Take back what was asked for, or stop its answer. An answer beside something that was refused
   * is another window's: that goes on. */
  async stop(): Promise<void> {
    const { live, pending } = this.store.get();
    if (pending !== null && (live === null || pending.error !== null)) {
      await this.#takeBack(pending);
    } else if (live !== null) {
      await this.#cancel(live);
    }
  }

  /** Show the branch that goes through `turn`, up to its newest end. */
  async switchTo(turn: string): Promise<void> {
    const open = this.store.get().open;
    if (open === null) return;
    const head = newestLeaf(childrenOf(open.turns), turn);
    await this.troubles.guarded(async () => {
      const session = await routes.changeSession(open.session.id, { head });
      this.store.dispatch({ type: "session", session });
      await this.#count(session.id);
    });
  }

  // --------------------------------------------------------------------------------- around

  async measureSpeed(): Promise<void> {
    try {
      let speed = await routes.meanSpeed();
      if (speed === null) {
        await routes.measure();
        speed = await routes.meanSpeed();
      }
      this.store.dispatch({ type: "meanSpeed", value: speed });
    } catch {
      // The page says that it is not known.
    }
  }

  // -------------------------------------------------------------------------------- details

  async #ask(pending: Pending, again = false): Promise<void> {
    this.#tries = again ? this.#tries + 1 : 0;
    this.#sending?.abort();
    const sending = (this.#sending = new AbortController());
    this.store.dispatch({ type: "pending", pending });
    try {
      const session = await this.#sessionFor(pending, sending.signal);
      let found: Found | undefined;
      if (pending.request.kind === "continue") {
        const now = await this.#whereItStands(session, pending);
        if (now === null) return;
        found = now;
      }
      const response = await routes.startAnswer(
        session,
        pending.request,
        pending.key,
        sending.signal,
      );
      const generation = response.headers.get("x-headwater-generation");
      if (generation === null) throw new Error("The server did not name the answer's stream.");
      if (this.store.get().pending?.key !== pending.key) {
        // Another session was opened meanwhile. The answer goes on without a reader.
        void response.body?.cancel();
        this.#said(session, pending);
        void this.reload(session);
        return;
      }
      const live = newLive(session, generation, Date.now(), found);
      this.store.dispatch({ type: "live", live });
      this.#follower.follow(generation, response);
      const tree = await this.#treeWith(generation, session);
      if (tree === null) return;
      this.store.dispatch({ type: "tree", ...tree });
      // Another window was quicker: what goes on is another answer.
      if (found !== undefined && tree.head !== found.turn) void this.reload(session);
    } catch (error) {
      if (sending.signal.aborted || this.troubles.isShutOut(error)) return;
      if (this.store.get().pending?.key !== pending.key) return;
      if (error instanceof ApiError && error.code === "session_busy") await this.#busy(pending);
      else this.#failed(pending, error);
    }
  }

  /** The tree in which the live answer stands, however often the line breaks; null where it is no
   * longer looked at. */
  async #treeWith(generation: string, session: string): Promise<Tree | null> {
    for (;;) {
      try {
        return await routes.readTree(session);
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 0)) throw error;
      }
      await new Promise((again) => setTimeout(again, TREE_MS));
      if (this.store.get().live?.generation !== generation) return null;
    }
  }

  /** The answer to be continued, as the server has it now; null where it is not the head. */
  async #whereItStands(session: string, { key, parent }: Pending): Promise<Found | null> {
    if (this.#continued?.key === key) return this.#continued.found; // it may be running already
    const { head, turns } = await routes.readTree(session);
    const turn = turns.find(({ id }) => id === head);
    if (this.store.get().pending?.key !== key) return null;
    if (turn === undefined || turn.id !== parent) {
      this.store.dispatch({ type: "gaveUp" });
      this.troubles.notice("This conversation went on in another window. Here it is.", "info");
      await this.reload(session);
      return null;
    }
    const found = { turn: turn.id, base: textOf(turn), tokens: turn.num_tokens, place: 0 };
    this.#continued = { key, found };
    return found;
  }

  /** Another window's answer runs in the session: show that one. */
  async #busy(pending: Pending): Promise<void> {
    const message = "Another window is being answered in this conversation.";
    if (pending.text === null) {
      this.store.dispatch({ type: "gaveUp" });
      this.troubles.notice(message, "info");
    } else {
      const error = { message, code: "session_busy", retryAt: null };
      this.store.dispatch({ type: "pendingFailed", key: pending.key, error });
    }
    const session = this.store.get().open?.session.id;
    if (session !== undefined) await this.reload(session);
  }

  async #cancel({ session, generation, phase: before }: Live): Promise<void> {
    this.store.dispatch({ type: "phase", generation, phase: "stopping" });
    try {
      await routes.cancelAnswer(session, AbortSignal.timeout(STOP_MS));
    } catch (error) {
      if (error instanceof ApiError && error.status === 409) return; // it ended by itself
      if (this.troubles.isShutOut(error)) return;
      const { live } = this.store.get();
      if (live?.generation !== generation) return;
      this.troubles.notice("The answer could not be stopped. It goes on; try again.", "error");
      if (live.phase !== "stopping") return;
      const phase = live.tokens > 0 ? "streaming" : before;
      this.store.dispatch({ type: "phase", generation, phase });
    }
  }

  /** The words come back into the field. Where the server has them already, its answer is stopped
   * instead. */
  async #takeBack(pending: Pending): Promise<void> {
    const { open } = this.store.get();
    this.#sending?.abort();
    this.store.dispatch({ type: "gaveUp" });
    const refused = pending.error !== null && pending.error.code !== "unreachable";
    if (refused || open === null) return;
    const session = open.session.id;
    await this.reload(session);
    const now = this.store.get();
    if (now.open?.session.id !== session || now.live === null) return;
    const taken = Object.values(now.open.turns).some((turn) => {
      if (pending.request.kind === "continue") return turn.id === now.live?.turn;
      if (turn.id in open.turns) return false;
      return pending.text === null ? turn.parent === pending.parent : textOf(turn) === pending.text;
    });
    if (!taken) return;
    this.#said(session, pending);
    await this.#cancel(now.live);
  }

  /** The server has it: it is not in the field any more. */
  #said(session: string, { text }: Pending): void {
    if (text === null) return;
    for (const of of [session, NEW]) this.store.dispatch({ type: "said", of, text });
  }

  /** The open session, or a new one for the first thing that is said. */
  async #sessionFor(pending: Pending, signal: AbortSignal): Promise<string> {
    const { open, draft } = this.store.get();
    if (open !== null) return open.session.id;
    const session = await routes.createSession(
      {
        title: titleOf(pending.text ?? ""),
        overflow: draft.overflow,
        defaults: draft.defaults,
        ...(draft.instructions.trim() === "" ? {} : { instructions: draft.instructions }),
      },
      `${pending.key}-session`,
    );
    if (signal.aborted) {
      void routes.deleteSession(session.id).catch(() => undefined);
      signal.throwIfAborted();
    }
    this.store.dispatch(
      this.store.get().pending?.key === pending.key
        ? { type: "opened", session, turns: [], pending }
        : { type: "session", session },
    );
    return session.id;
  }

  #failed(pending: Pending, error: unknown): void {
    const known = error instanceof ApiError ? error : null;
    const wait = known?.retryAfter ?? (known?.status === 0 ? 2 : null);
    const retryAt = wait !== null && this.#tries < MAX_TRIES ? Date.now() + 1000 * wait : null;
    const message = error instanceof Error ? error.message : String(error);
    this.store.dispatch({
      type: "pendingFailed",
      key: pending.key,
      error: { message, code: known?.code ?? "internal", retryAt },
    });
    if (retryAt === null) return;
    setTimeout(() => {
      const now = this.store.get().pending;
      if (now?.key === pending.key && now.error?.retryAt === retryAt) void this.retry();
    }, retryAt - Date.now());
  }

  async #fetch(id: string, again = false): Promise<void> {
    const tree = await routes.readTree(id);
    let session = await routes.readSession(
      id,
      tree.turns.some((turn) => turn.status === "running"),
    );
    const running = session.turns.find((turn) => turn.status === "running");
    if (again ? this.store.get().open?.session.id !== id : this.store.get().opening !== id) return;
    const { turns: path, ...bare } = session;
    session = { ...bare, turns: [] };
    const byPath = new Map(path.map((turn) => [turn.id, turn]));
    const turns = tree.turns.map((turn) => byPath.get(turn.id) ?? turn);
    this.store.dispatch({ type: "opened", session: bare, turns });
    const generation = running?.generation ?? bare.generating;
    if (generation !== null && generation !== undefined) {
      // The text and the place are of one moment; a continued answer's own tokens come before it.
      const found = running && {
        turn: running.id,
        base: textOf(running),
        tokens: running.num_tokens,
        place: 1 + running.num_tokens - (running.token_ids?.length ?? 0),
      };
      this.store.dispatch({ type: "live", live: newLive(id, generation, Date.now(), found) });
      this.#follower.follow(generation, null);
    } else {
      void this.#recall(id);
    }
    void this.#count(id);
  }

  /** What the last answer's stream told at its end, while the server still has it. */
  async #recall(id: string): Promise<void> {
    const open = this.store.get().open;
    const head = open?.session.head;
    const turn = head ? open?.turns[head] : undefined;
    if (open?.session.id !== id || turn?.generation == null || turn.role !== "assistant") return;
    const facts = await this.#follower.recall(turn.generation, turn.num_tokens).catch(() => null);
    if (facts !== null) this.store.dispatch({ type: "facts", turn: turn.id, facts });
  }

  async #count(id: string): Promise<void> {
    const { tokens } = await routes.readCache(id).catch(() => ({ tokens: null }));
    if (tokens !== null) this.store.dispatch({ type: "pathTokens", session: id, tokens });
  }

  /** Look at something else. What was sent and what is answered goes on. */
  #leave(): void {
    this.#sending = null;
    this.#follower.leave();
  }

  /** The session is opened anew once one has signed in. */
  #shutOut(): void {
    this.#sending?.abort();
    this.close();
  }
}

/** The first words, as a name. */
export function titleOf(text: string): string {
  const words = text.trim().replace(/\s+/g, " ");
  if (words.length <= 60) return words || "Untitled";
  return `${words.slice(0, 60).replace(/\s+\S*$/, "")}…`;
}
