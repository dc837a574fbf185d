import { memo, useEffect, useRef } from "react";
import type { Turn } from "../../api/types";
import { textOf } from "../../state/tree";
import { useChat, useChatState } from "../context";
import { CopyButton } from "../CopyButton";
import { IconButton } from "../Icon";
import { isComposing } from "../keys";
import { useWords } from "../useWords";
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
            turn={turn.id}
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

interface EditProps {
  turn: string;
  text: string;
  onCancel: () => void;
  onSend: (text: string) => void;
}

function Edit({ turn, text, onCancel, onSend }: EditProps) {
  const [words, setWords] = useWords(turn, text);
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    // Scrolled away and back, it takes no focus from a field that is being written in.
    const at = document.activeElement;
    if (at instanceof HTMLTextAreaElement && at.value !== "") return;
    area.current?.focus();
    area.current?.setSelectionRange(-1, -1);
  }, []);
  const cancel = () => {
    setWords(null);
    onCancel();
  };
  const send = () => {
    if (words.trim() === "") return;
    setWords(null);
    onSend(words);
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
            cancel();
          }
        }}
      />
      <div className="edit-tools">
        <span className="note">The first wording stays, as a branch.</span>
        <button type="button" className="button button-quiet" onClick={cancel}>
          Cancel
        </button>
        <button type="button" className="button button-primary" onClick={send}>
          Send
        </button>
      </div>
    </div>
  );
}
