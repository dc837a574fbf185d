import { memo } from "react";
import type { Turn } from "../../api/types";
import type { Phase } from "../../state/live";
import { textOf } from "../../state/tree";
import { useChat, useChatState } from "../context";
import { CopyButton } from "../CopyButton";
import { IconButton } from "../Icon";
import { go } from "../place";
import { Markdown } from "../prose/Markdown";
import { Branches } from "./Branches";
import { EndedMargin, LiveMargin, SendingMargin } from "./Margin";

interface Props {
  turn: Turn;
  siblings: readonly string[];
  atHead: boolean;
  onFork: (turn: string) => void;
}

export const AnswerTurn = memo(function AnswerTurn({ turn, siblings, atHead, onFork }: Props) {
  const chat = useChat();
  const facts = useChatState((state) => state.facts[turn.id]);
  const busy = useChatState((state) => state.live !== null || state.pending !== null);
  const text = textOf(turn);
  const unfinished = turn.status === "interrupted" || turn.finish_reason === "length";
  return (
    <article className="turn turn-answer" aria-label="Answer" data-turn={turn.id}>
      <div className="turn-body">
        <h2 className="hidden">The model said</h2>
        <Markdown text={text} />
        {text === "" && <p className="note">It said nothing.</p>}
        {unfinished && atHead && (
          <p className="unfinished">
            {turn.finish_reason === "length"
              ? "It came to its limit."
              : turn.finish_reason === "error"
                ? "It broke off."
                : "It was stopped here."}{" "}
            <button
              type="button"
              className="button"
              disabled={busy}
              onClick={() => void chat.goOn(turn.id)}
            >
              Continue
            </button>
          </p>
        )}
        <div className="turn-tools">
          <Branches turn={turn.id} siblings={siblings} />
          <IconButton
            icon="again"
            label="Answer again"
            disabled={busy}
            onClick={() => void chat.regenerate(turn.id)}
          />
          <CopyButton text={text} label="Copy" />
          <IconButton
            icon="fork"
            label="Fork the session here"
            disabled={busy}
            onClick={() => onFork(turn.id)}
          />
          <button
            type="button"
            className="button button-tool"
            disabled={busy}
            title="Its tokens, what else was likely, and how they were made"
            onClick={() => go({ session: turn.session, view: { turn: turn.id } })}
          >
            Tokens
          </button>
        </div>
      </div>
      <aside className="turn-margin" aria-label="About this answer">
        <EndedMargin turn={turn} facts={facts} />
      </aside>
    </article>
  );
});

const HINDRANCES: Partial<Record<Phase, string>> = {
  paused: "Paused: the engine is being restarted. Then it goes on with the very next token.",
  lost: "The connection is lost; trying again. The answer is written on meanwhile.",
};

/** The answer that is being written. */
export function LiveTurn() {
  const live = useChatState((state) => state.live);
  if (live === null) return null;
  const text = live.base + live.text;
  return (
    <article className="turn turn-answer" aria-label="Answer" aria-busy="true">
      <div className="turn-body" data-phase={live.phase}>
        <h2 className="hidden">The model says</h2>
        {text === "" ? <p className="waiting" aria-hidden="true" /> : <Markdown text={text} />}
        <p className="hindrance" role="status">
          {HINDRANCES[live.phase]}
        </p>
      </div>
      <aside className="turn-margin" aria-label="About this answer">
        <LiveMargin live={live} />
      </aside>
    </article>
  );
}

/** The answer that was asked for, until the server has taken the question. */
export function SendingTurn() {
  return (
    <article className="turn turn-answer" aria-label="Answer" aria-busy="true">
      <div className="turn-body" data-phase="sending">
        <p className="waiting" aria-hidden="true" />
      </div>
      <aside className="turn-margin" aria-label="About this answer">
        <SendingMargin />
      </aside>
    </article>
  );
}
