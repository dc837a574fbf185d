/** Where one is: what is shown is in the address, so that reload, back and links work. */

import { useMemo, useSyncExternalStore } from "react";

export interface Place {
  session: string | null;
  view: "text" | "cache" | "kv" | { turn: string };
}

export function placeOf(location: { pathname: string; search: string }): Place {
  const session = /^\/s\/(sess_[0-9a-f]+)$/.exec(location.pathname)?.[1] ?? null;
  const search = new URLSearchParams(location.search);
  const turn = search.get("turn");
  const view = search.get("view");
  if (view === "kv") return { session, view };
  if (session === null) return { session, view: "text" };
  if (turn !== null) return { session, view: { turn } };
  return { session, view: view === "cache" ? "cache" : "text" };
}

export function addressOf({ session, view }: Place): string {
  const path = session === null ? "/" : `/s/${session}`;
  if (view === "text") return path;
  const search = typeof view === "string" ? { view } : { turn: view.turn };
  return `${path}?${new URLSearchParams(search).toString()}`;
}

/** `replace`: as if one had been there from the start. */
export function go(place: Place, replace = false): void {
  const address = addressOf(place);
  if (address === location.pathname + location.search) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  dispatchEvent(new PopStateEvent("popstate"));
}

export function usePlace(): Place {
  const address = useSyncExternalStore(
    (listener) => {
      addEventListener("popstate", listener);
      return () => removeEventListener("popstate", listener);
    },
    () => location.pathname + location.search,
  );
  return useMemo(() => placeOf(new URL(address, location.origin)), [address]);
}
