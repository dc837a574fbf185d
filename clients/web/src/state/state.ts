/** What the page knows. */

import type { AnswerRequest } from "../api/routes";
import type { ModelCard, Sampling, Session, Turn } from "../api/types";
import type { Facts, Live, Told } from "./live";
import type { Turns } from "./tree";
import type { Words } from "./words";

/** What was asked for and is not in the tree yet. `parent`: the turn that it follows. */
export interface Pending {
  key: string;
  request: AnswerRequest;
  parent: string | null;
  /** The user's words; null where the answer is to a turn that is there. */
  text: string | null;
  error: Trouble | null;
}

/** Something that went wrong, in the words of whoever refused. */
export interface Trouble {
  message: string;
  code: string;
  /** When it is tried again by itself; ms by the clock of the actions. */
  retryAt: number | null;
}

export interface Notice {
  id: number;
  text: string;
  kind: "info" | "error";
  /** A deleted session that can be had back. */
  undo?: string;
}

/** How a new session begins. */
export interface Draft {
  instructions: string;
  overflow: Session["overflow"];
  defaults: Sampling;
}

export const EMPTY_DRAFT: Draft = { instructions: "", overflow: "error", defaults: {} };

export interface Open {
  session: Session;
  turns: Turns;
}

export interface State {
  /** `unknown` until the server answers; `out`: it wants a key. */
  door: "unknown" | "in" | "out" | "unreachable";
  model: ModelCard | null;
  meanSpeed: number | null;
  sessions: readonly Session[];
  moreSessions: boolean;
  query: string;
  /** The session that is being fetched. */
  opening: string | null;
  open: Open | null;
  draft: Draft;
  words: Words;
  pending: Pending | null;
  live: Live | null;
  /** What is known of the answers that ended while they were looked at, by turn. */
  facts: Readonly<Record<string, Facts>>;
  /** Tokens of the path to the head. */
  pathTokens: number | null;
  notices: readonly Notice[];
  deleted: readonly string[];
}

export const emptyState = (draft: Draft): State => ({
  door: "unknown",
  model: null,
  meanSpeed: null,
  sessions: [],
  moreSessions: false,
  query: "",
  opening: null,
  open: null,
  draft,
  words: {},
  pending: null,
  live: null,
  facts: {},
  pathTokens: null,
  notices: [],
  deleted: [],
});

export type Action =
  | { type: "door"; door: State["door"] }
  | { type: "model"; model: ModelCard }
  | { type: "meanSpeed"; value: number | null }
  | { type: "listed"; query: string; sessions: Session[]; more: boolean; appended: boolean }
  | { type: "query"; query: string }
  | { type: "opening"; id: string | null }
  /** `pending`: what the session was made for. */
  | { type: "opened"; session: Session; turns: Turn[]; pending?: Pending }
  | { type: "closed" }
  | { type: "session"; session: Session }
  | { type: "tree"; session: string; head: string | null; turns: Turn[] }
  | { type: "draft"; draft: Draft }
  | { type: "words"; of: string; text: string | null }
  | { type: "putBack"; of: string; text: string }
  | { type: "said"; of: string; text: string }
  | { type: "gaveUp" }
  | { type: "forgotten"; draft: Draft }
  | { type: "pending"; pending: Pending | null }
  | { type: "pendingFailed"; key: string; error: Trouble }
  | { type: "live"; live: Live }
  | { type: "phase"; generation: string; phase: Live["phase"] }
  | { type: "told"; generation: string; events: Told[]; now: number }
  | { type: "left"; generation: string }
  | { type: "facts"; turn: string; facts: Facts }
  | { type: "pathTokens"; session: string; tokens: number }
  | { type: "notice"; notice: Notice }
  | { type: "noticeGone"; id: number }
  | { type: "deleted"; id: string }
  | { type: "undeleted"; id: string };
