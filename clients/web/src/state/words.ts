/** What is written and not said yet, by where it is written: a session's id, `new`, or the id of a
 * turn that is being edited. Pure. */

import type { State } from "./state";

export type Words = Readonly<Record<string, string>>;

export const NEW = "new";

/** null: nothing is known of what is written there. */
export function withWords(words: Words, of: string, text: string | null): Words {
  const { [of]: _, ...others } = words;
  return text === null ? others : { ...others, [of]: text };
}

/** `text` is in the field again, before what has been written there since. */
export function putBack(words: Words, of: string, text: string): Words {
  const since = words[of] ?? "";
  return { ...words, [of]: since === "" ? text : `${text}\n${since}` };
}

/** Whether the server has what is pending: its answer is there. A refused one it never has. */
const isTaken = ({ pending, live }: State) => live !== null && pending?.error === null;

/** The words with those that wait for the server. It is they that outlive the page. */
export function unsaid(state: State): Words {
  const text = state.pending?.text ?? null;
  if (text === null || isTaken(state)) return state.words;
  return putBack(state.words, state.open?.session.id ?? NEW, text);
}

/** Nothing is pending; what the server has not taken is in the field of its session again. */
export const withWordsBack = (state: State): State =>
  state.pending === null ? state : { ...state, words: unsaid(state), pending: null };
