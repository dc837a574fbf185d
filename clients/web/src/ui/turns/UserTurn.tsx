import { memo, useEffect, useRef, useState } from "react";
import type { Turn } from "../../api/types";
import { textOf } from "../../state/tree";
import { useChat, useChatState } from "../context";
import { CopyButton } from "../CopyButton";
import { IconButton } from "../Icon";
import { isComposing } from "../keys";
import { Branches } from "./Branches";

interface Props {
  turn: Turn;
  siblings: readonly string[];
  /** Whether it is being edited; there is one edit at a time. */
  editing: boolean;
  onEdit: (turn: string | null) => void;
  onFork: (turn: string) => void;
}

export const UserTurn = memo(function UserTurn(props: Props) {
  const { turn, editing } = props;
  const chat = useChat();
  const busy = useChatState((state) => state.live !== null || state.pending !== null);
  const text = textOf(turn);
  return (
    <article className="turn turn-user" aria-label="You" data-turn={turn.id}>
      <div className="turn-body">
        <h2 className="hidden">{turn.role === "user" ? "You said" : `Said as ${turn.role}`}</h2>
        {editing ? (
          <Edit
            text={text}
            onCancel={() => props.onEdit(null)}
            onSend={(words) => {
              props.onEdit(null);
              void chat.send(words, turn.parent);
            }}
          />
        ) : (
          <>
            <p className="said">{text}</p>
            <div className="turn-tools">
              <Branches turn={turn.id} siblings={props.siblings} />
              <IconButton
                icon="edit"
                label="Edit, as another branch"
                disabled={busy}
                onClick={() => props.onEdit(turn.id)}
              />
              <CopyButton text={text} label="Copy" />
              <IconButton
                icon="fork"
                label="Fork the session here"
                disabled={busy}
                onClick={() => props.onFork(turn.id)}
              />
            </div>
          </>
        )}
      </div>
    </article>
  );
});

/** What was said and has not been taken yet. */
export function SaidTurn({ text }: { text: string }) {
  return (
    <article className="turn turn-user" aria-label="You">
      <div className="turn-body">
        <h2 className="hidden">You said</h2>
        <p className="said">{text}</p>
        <div className="turn-tools" />
      </div>
    </article>
  );
}

function Edit(props: { text: string; onCancel: () => void; onSend: (text: string) => void }) {
  const [words, setWords] = useState(props.text);
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    area.current?.focus();
    area.current?.setSelectionRange(props.text.length, props.text.length);
  }, [props.text]);
  const send = () => {
    if (words.trim() !== "") props.onSend(words);
  };
  return (
    <div className="edit">
      <textarea
        ref={area}
        aria-label="What you said, to be changed"
        value={words}
        onChange={(event) => setWords(event.target.value)}
        onKeyDown={(event) => {
          if (isComposing(event.nativeEvent)) return;
          if (event.key === "Enter" && !event.shiftKey) {
            event.preventDefault();
            send();
          }
          if (event.key === "Escape") {
            event.stopPropagation();
            props.onCancel();
          }
        }}
      />
      <div className="edit-tools">
        <span className="note">The first wording stays, as a branch.</span>
        <button type="button" className="button button-quiet" onClick={props.onCancel}>
          Cancel
        </button>
        <button type="button" className="button button-primary" onClick={send}>
          Send
        </button>
      </div>
    </div>
  );
}
