/** A session is a tree of turns; what is read is the path from its root to its head. */

import type { Turn } from "../api/types";

export type Turns = Readonly<Record<string, Turn>>;

/** The turns from the root to `head`. Ends early where a parent is not known. */
export function pathTo(turns: Turns, head: string | null): Turn[] {
  const path: Turn[] = [];
  for (let at = head; at !== null;) {
    const turn: Turn | undefined = turns[at];
    if (turn === undefined || path.length > Object.keys(turns).length) break;
    path.push(turn);
    at = turn.parent;
  }
  return path.reverse();
}

/** Ids of the children of each turn, in the order in which they were made; the roots under "". */
export function childrenOf(turns: Turns): Map<string, string[]> {
  const children = new Map<string, string[]>();
  for (const turn of Object.values(turns)) {
    const parent = turn.parent ?? "";
    const list = children.get(parent);
    if (list === undefined) children.set(parent, [turn.id]);
    else list.push(turn.id);
  }
  return children;
}

/** Where a branch that begins at `turn` ends: its newest child's newest child, and so on. */
export function newestLeaf(children: Map<string, string[]>, turn: string): string {
  let at = turn;
  for (;;) {
    const next = children.get(at)?.at(-1);
    if (next === undefined) return at;
    at = next;
  }
}

export const textOf = (turn: Turn): string =>
  turn.content.map((item) => (item.type === "text" ? (item.text ?? "") : "")).join("");
