/** What this browser keeps of its own: the theme, how new sessions begin, what is half written.
 * Never a key. */

import { EMPTY_DRAFT, type Draft, type State } from "../state/state";
import type { Store } from "../state/store";
import { NEW, unsaid, type Words } from "../state/words";

export type Theme = "system" | "light" | "dark";

const read = (key: string): string | null => {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage is switched off
  }
};

export function keep(key: string, value: string): void {
  try {
    if (value === "") localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // It is forgotten with the page, then.
  }
}

export function keptTheme(): Theme {
  const theme = read("headwater.theme");
  return theme === "light" || theme === "dark" ? theme : "system";
}

export function applyTheme(theme: Theme): void {
  if (theme === "system") delete document.documentElement.dataset["theme"];
  else document.documentElement.dataset["theme"] = theme;
  keep("headwater.theme", theme === "system" ? "" : theme);
}

export function keptDraft(): Draft {
  try {
    return { ...EMPTY_DRAFT, ...(JSON.parse(read("headwater.draft") ?? "{}") as Partial<Draft>) };
  } catch {
    return EMPTY_DRAFT;
  }
}

export const keepDraft = (draft: Draft): void => keep("headwater.draft", JSON.stringify(draft));

const WORDS = "headwater.words.";
/** What is half written in a session, in the next one (null), or as the edit of a turn. */
export const keptWords = (of: string | null): string => read(WORDS + (of ?? NEW)) ?? "";

/** Keep what is not said yet as it changes. */
export function keepWords(store: Store<State, unknown>): () => void {
  let kept: Words = {};
  return store.subscribe(() => {
    const words = unsaid(store.get());
    if (words === kept) return;
    for (const of of new Set([...Object.keys(kept), ...Object.keys(words)])) {
      const text = words[of] ?? "";
      if (text !== (kept[of] ?? "") && text !== keptWords(of)) keep(WORDS + of, text);
    }
    kept = words;
  });
}

/** What another window has written, as it writes it. */
export function watchWords(tell: (of: string, text: string) => void): () => void {
  const onStorage = ({ key }: StorageEvent) => {
    if (!key?.startsWith(WORDS)) return;
    const of = key.slice(WORDS.length);
    tell(of, keptWords(of)); // by now it may be newer than what the event tells
  };
  addEventListener("storage", onStorage);
  return () => removeEventListener("storage", onStorage);
}

/** What whoever signs out has written here; how new sessions begin then. */
export function forget(): Draft {
  try {
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(WORDS)) localStorage.removeItem(key);
    }
  } catch {
    // There is nothing.
  }
  keep("headwater.draft", "");
  return EMPTY_DRAFT;
}

/** Whether one signed in here; the cookie that says so cannot be read. */
export const keptSignedIn = (): boolean => read("headwater.signed-in") !== null;
export const keepSignedIn = (signedIn: boolean): void =>
  keep("headwater.signed-in", signedIn ? "yes" : "");
