/** What the page does: it asks the server, and tells the store. The only place with both. */

import { ApiError, newKey } from "../api/client";
import * as routes from "../api/routes";
import type { Sampling } from "../api/types";
import { Follower } from "./follower";
import { newLive, type Live } from "./live";
import { reduce } from "./reducer";
import { SessionList } from "./sessions";
import { emptyState, type Action, type Draft, type Pending, type State } from "./state";
import { createStore, type Store } from "./store";
import { childrenOf, newestLeaf, textOf } from "./tree";
import { Troubles } from "./troubles";

const MAX_TRIES = 6;
const STOP_MS = 10_000;

export class Chat {
  readonly store: Store<State, Action>;
  readonly sessions: SessionList;
  readonly troubles: Troubles;
  readonly #follower: Follower;
  #sending: AbortController | null = null;
  #opening: Promise<boolean> = Promise.resolve(true);
  #tries = 0;

  constructor(draft: Draft) {
    this.store = createStore(reduce, emptyState(draft));
    this.troubles = new Troubles(this.store, () => this.#leave());
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
    await this.troubles.guarded(() => routes.logout());
    this.close();
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
      const title = `${fork.title ?? "Untitled"} (fork)`.slice(0, 1024);
      const session = await routes.changeSession(fork.id, { title });
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
    if (this.store.get().opening !== null) await this.#opening;
    const { open } = this.store.get();
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

  /** Go on with the answer at the head. */
  async goOn(): Promise<void> {
    const session = this.store.get().open?.session;
    const head = session?.head ?? null;
    const limit = session?.defaults.max_tokens;
    const request = {
      kind: "continue",
      ...(limit === undefined ? {} : { max_tokens: limit }),
    } as const;
    await this.#ask({ key: newKey(), request, parent: head, text: null, error: null });
  }

  /** The same request again; it makes one answer however often it is sent. */
  async retry(): Promise<void> {
    const pending = this.store.get().pending;
    if (pending !== null) await this.#ask({ ...pending, error: null }, true);
  }

  dropPending(): void {
    this.#sending?.abort();
    this.store.dispatch({ type: "pending", pending: null });
  }

  async stop(): Promise<void> {
    const { live, pending, open } = this.store.get();
    if (live !== null) return this.#cancel(live);
    if (pending !== null) this.dropPending(); // the server may have taken it already
    const session = open?.session.id;
    if (session === undefined) return;
    await routes.cancelAnswer(session, AbortSignal.timeout(STOP_MS)).catch((error: unknown) => {
      // Nothing runs: it was never begun.
      if (!(error instanceof ApiError && error.status === 409)) this.troubles.tell(error);
    });
    await this.reload(session);
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
      const session = await this.#sessionFor(pending);
      const head = this.store.get().open?.session.head ?? null;
      const turn = head === null ? undefined : this.store.get().open?.turns[head];
      const response = await routes.startAnswer(
        session,
        pending.request,
        pending.key,
        sending.signal,
      );
      const generation = response.headers.get("x-headwater-generation");
      if (generation === null) throw new Error("The server did not name the answer's stream.");
      if (this.store.get().open?.session.id !== session) return; // it goes on without a reader
      const found =
        pending.request.kind === "continue" && turn !== undefined
          ? { turn: turn.id, base: textOf(turn), tokens: turn.num_tokens, place: 0 }
          : undefined;
      const live = newLive(session, generation, Date.now(), found);
      this.store.dispatch({ type: "live", live });
      this.#follower.follow(generation, response);
      const tree = await routes.readTree(session);
      this.store.dispatch({ type: "tree", ...tree });
    } catch (error) {
      if (sending.signal.aborted || this.troubles.isShutOut(error)) return;
      this.#failed(pending, error);
    }
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

  /** The open session, or a new one for the first thing that is said. */
  async #sessionFor(pending: Pending): Promise<string> {
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
    this.store.dispatch({ type: "opened", session, turns: [] });
    this.store.dispatch({ type: "pending", pending });
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

  #leave(): void {
    this.#sending?.abort();
    this.#follower.leave();
  }
}

/** The first words, as a name. */
export function titleOf(text: string): string {
  const words = text.trim().replace(/\s+/g, " ");
  if (words.length <= 60) return words || "Untitled";
  return `${words.slice(0, 60).replace(/\s+\S*$/, "")}…`;
}
