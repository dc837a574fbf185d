/** What this browser keeps of its own: the theme, how new sessions begin, what is half written.
 * Never a key. */

import type { Draft } from "../state/state";

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
  const empty: Draft = { instructions: "", overflow: "error", defaults: {} };
  try {
    return { ...empty, ...(JSON.parse(read("headwater.draft") ?? "{}") as Partial<Draft>) };
  } catch {
    return empty;
  }
}

export const keepDraft = (draft: Draft): void => keep("headwater.draft", JSON.stringify(draft));

const wordsKey = (session: string | null) => `headwater.words.${session ?? "new"}`;
export const keptWords = (session: string | null): string => read(wordsKey(session)) ?? "";
export const keepWords = (session: string | null, words: string): void =>
  keep(wordsKey(session), words);

/** Whether one signed in here; the cookie that says so cannot be read. */
export const keptSignedIn = (): boolean => read("headwater.signed-in") !== null;
export const keepSignedIn = (signedIn: boolean): void =>
  keep("headwater.signed-in", signedIn ? "yes" : "");
