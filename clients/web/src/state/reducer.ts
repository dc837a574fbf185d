/** How the page's state changes. Pure: no clock, no network. */

import type { Session, Turn } from "../api/types";
import { toldLive, type Live } from "./live";
import { emptyState, type Action, type State } from "./state";
import { textOf, type Turns } from "./tree";
import { NEW, putBack, withWords, withWordsBack } from "./words";

export function reduce(state: State, action: Action): State {
  switch (action.type) {
    case "door":
      return { ...state, door: action.door };
    case "model":
      return { ...state, model: action.model, door: "in" };
    case "meanSpeed":
      return { ...state, meanSpeed: action.value };
    case "query":
      return { ...state, query: action.query };
    case "listed":
      return listed(state, action);
    case "opening":
      return { ...withWordsBack(state), opening: action.id };
    case "opened":
      return opened(state, action);
    case "closed":
      return { ...withWordsBack(state), opening: null, open: null, live: null, pathTokens: null };
    case "session":
      return {
        ...state,
        open:
          state.open?.session.id === action.session.id
            ? { ...state.open, session: action.session }
            : state.open,
        sessions: withSession(state.sessions, action.session),
      };
    case "tree":
      return withTree(state, action);
    case "draft":
      return { ...state, draft: action.draft };
    case "words":
      return { ...state, words: withWords(state.words, action.of, action.text) };
    case "putBack":
      return { ...state, words: putBack(state.words, action.of, action.text) };
    case "said":
      return state.words[action.of] === action.text
        ? { ...state, words: withWords(state.words, action.of, "") }
        : state;
    case "gaveUp":
      return withWordsBack(state);
    case "forgotten":
      return { ...emptyState(action.draft), door: state.door, notices: state.notices };
    case "pending":
      return { ...state, pending: action.pending };
    case "pendingFailed":
      return state.pending?.key === action.key
        ? { ...state, pending: { ...state.pending, error: action.error } }
        : state;
    case "live":
      return generating(
        { ...state, live: action.live },
        action.live.session,
        action.live.generation,
      );
    case "phase":
      return state.live?.generation === action.generation
        ? { ...state, live: { ...state.live, phase: action.phase } }
        : state;
    case "told":
      if (state.live?.generation !== action.generation) return state;
      return settled({ ...state, live: toldLive(state.live, action.events, action.now) });
    case "left":
      return state.live?.generation === action.generation ? { ...state, live: null } : state;
    case "facts":
      return { ...state, facts: { ...state.facts, [action.turn]: action.facts } };
    case "pathTokens":
      return state.open?.session.id === action.session
        ? { ...state, pathTokens: action.tokens }
        : state;
    case "notice":
      return { ...state, notices: [...state.notices.slice(-3), action.notice] };
    case "noticeGone":
      return { ...state, notices: state.notices.filter((notice) => notice.id !== action.id) };
    case "deleted":
      return { ...state, deleted: [...state.deleted, action.id] };
    case "undeleted":
      return { ...state, deleted: state.deleted.filter((id) => id !== action.id) };
  }
}

function opened(state: State, action: Extract<Action, { type: "opened" }>): State {
  const { session, turns } = action;
  // Read again, the session still has what it refused or was not told yet.
  const taken = state.live !== null && state.pending?.error === null;
  const same = state.open?.session.id === session.id && !taken;
  const kept = same ? state : withWordsBack(state);
  return {
    ...kept,
    ...(action.pending && {
      pending: action.pending,
      words: { ...state.words, [session.id]: state.words[NEW] ?? "", [NEW]: "" },
    }),
    opening: null,
    open: { session, turns: byId(turns) },
    sessions: withSession(state.sessions, session),
    live: null,
    facts: {},
    pathTokens: null,
  };
}

function listed(state: State, action: Extract<Action, { type: "listed" }>): State {
  if (action.query !== state.query) return state; // an answer to an earlier question
  const known = action.appended ? state.sessions : [];
  const ids = new Set(known.map((session) => session.id));
  const sessions = [...known, ...action.sessions.filter((session) => !ids.has(session.id))];
  const fresh = sessions.find((session) => session.id === state.open?.session.id);
  const open =
    state.open !== null && fresh !== undefined
      ? { ...state.open, session: { ...fresh, head: state.open.session.head } }
      : state.open;
  return { ...state, sessions, moreSessions: action.more, open };
}

function byId(turns: readonly Turn[]): Turns {
  return Object.fromEntries(turns.map((turn) => [turn.id, turn]));
}

function withSession(sessions: readonly Session[], session: Session): readonly Session[] {
  return sessions.some((known) => known.id === session.id)
    ? sessions.map((known) => (known.id === session.id ? session : known))
    : [session, ...sessions];
}

function withTree(state: State, action: Extract<Action, { type: "tree" }>): State {
  const { open, pending, live } = state;
  if (open?.session.id !== action.session) return state;
  const arrived = live !== null && action.turns.some((turn) => turn.generation === live.generation);
  return settled({
    ...state,
    open: { session: { ...open.session, head: action.head }, turns: byId(action.turns) },
    pending: arrived && pending?.error === null ? null : pending,
  });
}

function generating(state: State, session: string, generation: string | null): State {
  const mark = (known: Session) =>
    known.id === session ? { ...known, generating: generation } : known;
  return {
    ...state,
    sessions: state.sessions.map(mark),
    open: state.open && { ...state.open, session: mark(state.open.session) },
  };
}

/** An answer that ended becomes a turn like the others, in the same step, so that nothing moves. */
function settled(state: State): State {
  const { live, open } = state;
  if (live === null || open === null) return state;
  if (live.phase !== "done" && live.phase !== "failed") return state;
  const turn = liveTurn(open.turns, live);
  if (turn === null) return state; // the tree with it is on its way
  const ended = endedTurn(turn, live);
  const after = generating(state, live.session, null);
  return {
    ...after,
    live: null,
    open: after.open && { ...after.open, turns: { ...open.turns, [turn.id]: ended } },
    facts: live.facts === null ? state.facts : { ...state.facts, [turn.id]: live.facts },
    pathTokens: live.facts?.usage.total_tokens ?? state.pathTokens,
    meanSpeed: live.facts?.timings.decode_tokens_per_s || state.meanSpeed,
    notices:
      live.error === null
        ? state.notices
        : [...state.notices, { id: live.sentAt, kind: "error", text: live.error.message }],
  };
}

/** The turn that the live answer writes. */
export function liveTurn(turns: Turns, live: Live): Turn | null {
  if (live.turn !== null) return turns[live.turn] ?? null;
  return Object.values(turns).find((turn) => turn.generation === live.generation) ?? null;
}

function endedTurn(turn: Turn, live: Live): Turn {
  const reason = live.facts?.finishReason ?? "error";
  const whole = reason === "stop" || reason === "length";
  const text = live.base + live.text;
  return {
    ...turn,
    status: whole ? "complete" : "interrupted",
    finish_reason: reason,
    num_tokens: Math.max(live.tokens, turn.num_tokens),
    content: text === textOf(turn) ? turn.content : [{ type: "text", text }],
  };
}
