/** What people are told when something does not work, and when something is done. */

import { ApiError } from "../api/client";
import type { Action, Notice, State } from "./state";
import type { Store } from "./store";

export class Troubles {
  readonly #store: Store<State, Action>;
  readonly #onShutOut: () => void;
  #ids = 0;

  /** `onShutOut`: the server wants a key. */
  constructor(store: Store<State, Action>, onShutOut: () => void) {
    this.#store = store;
    this.#onShutOut = onShutOut;
  }

  /** The answer; null where there is none, and then people are told why. */
  async guarded<T>(ask: () => Promise<T>): Promise<T | null> {
    try {
      return await ask();
    } catch (error) {
      this.tell(error);
      return null;
    }
  }

  tell(error: unknown): void {
    if (this.isShutOut(error)) return;
    this.notice(error instanceof Error ? error.message : String(error), "error");
  }

  /** Returns the notice's id. */
  notice(text: string, kind: Notice["kind"], undo?: string): number {
    const id = ++this.#ids;
    const notice = { id, text, kind, ...(undo === undefined ? {} : { undo }) };
    this.#store.dispatch({ type: "notice", notice });
    return id;
  }

  dismiss(id: number): void {
    this.#store.dispatch({ type: "noticeGone", id });
  }

  /** Whether it says that one has to sign in; then the page asks for the key. */
  isShutOut(error: unknown): boolean {
    if (!(error instanceof ApiError) || error.status !== 401) return false;
    this.#onShutOut();
    this.#store.dispatch({ type: "door", door: "out" });
    return true;
  }
}
