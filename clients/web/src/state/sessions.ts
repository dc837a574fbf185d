/** The list of sessions, and what can be done with one that need not be open. */

import * as routes from "../api/routes";
import type { Action, State } from "./state";
import type { Store } from "./store";
import type { Troubles } from "./troubles";

/** How long a deleted session can be had back. */
const UNDO_MS = 7000;

export class SessionList {
  readonly #store: Store<State, Action>;
  readonly #troubles: Troubles;
  readonly #onElsewhere: (session: string) => void;
  #doomed = new Map<string, ReturnType<typeof setTimeout>>();

  /** `onElsewhere`: another window has begun an answer in the open session. */
  constructor(
    store: Store<State, Action>,
    troubles: Troubles,
    onElsewhere: (session: string) => void,
  ) {
    this.#store = store;
    this.#troubles = troubles;
    this.#onElsewhere = onElsewhere;
  }

  /** The first page of sessions in which `query` is found. */
  async list(query: string): Promise<void> {
    this.#store.dispatch({ type: "query", query });
    await this.#troubles.guarded(async () => {
      const page = await routes.listSessions(query, null);
      const { data: sessions, has_more: more } = page;
      this.#store.dispatch({ type: "listed", query, sessions, more, appended: false });
      const { open, live, pending } = this.#store.get();
      if (open?.session.generating != null && live === null && pending === null) {
        this.#onElsewhere(open.session.id);
      }
    });
  }

  async listMore(): Promise<void> {
    const { query, sessions } = this.#store.get();
    await this.#troubles.guarded(async () => {
      const page = await routes.listSessions(query, sessions.at(-1)?.id ?? null);
      const { data, has_more: more } = page;
      this.#store.dispatch({ type: "listed", query, sessions: data, more, appended: true });
    });
  }

  async rename(id: string, title: string): Promise<void> {
    await this.#troubles.guarded(async () => {
      const session = await routes.changeSession(id, { title: title.trim() || null });
      this.#store.dispatch({ type: "session", session });
    });
  }

  /** Take it from the list now, and from the server once it can no longer be had back. */
  remove(id: string): void {
    this.#store.dispatch({ type: "deleted", id });
    const title = this.#store.get().sessions.find((session) => session.id === id)?.title;
    const notice = this.#troubles.notice(`“${title ?? "Untitled"}” is deleted.`, "info", id);
    this.#doomed.set(
      id,
      setTimeout(() => {
        this.#store.dispatch({ type: "noticeGone", id: notice });
        void this.#destroy(id);
      }, UNDO_MS),
    );
  }

  undoRemove(id: string): void {
    clearTimeout(this.#doomed.get(id));
    this.#doomed.delete(id);
    this.#store.dispatch({ type: "undeleted", id });
  }

  /** The page is being closed: what was deleted stays deleted. */
  leavePage(): void {
    for (const [id, timer] of this.#doomed) {
      clearTimeout(timer);
      void routes.deleteSession(id, true).catch(() => undefined);
    }
    this.#doomed.clear();
  }

  async importTranscript(text: string): Promise<string | null> {
    return this.#troubles.guarded(async () => {
      let transcript: unknown;
      try {
        transcript = JSON.parse(text);
      } catch {
        throw new Error("That file is no JSON; export a session to see what is expected.");
      }
      const session = await routes.importSession(transcript);
      this.#store.dispatch({ type: "session", session });
      return session.id;
    });
  }

  async #destroy(id: string): Promise<void> {
    this.#doomed.delete(id);
    await this.#troubles.guarded(() => routes.deleteSession(id));
    await this.list(this.#store.get().query);
    this.#store.dispatch({ type: "undeleted", id });
  }
}
