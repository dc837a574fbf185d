import { useEffect, useLayoutEffect, useRef } from "react";
import { NEW } from "../state/words";
import { useChat, useChatState } from "./context";
import { ContextMeter } from "./ContextMeter";
import { Icon } from "./Icon";
import { isComposing } from "./keys";
import { useWords } from "./useWords";

/** Where one writes. What is half written is kept, for each session. */
export function Composer(props: { session: string | null; onEditLast: () => void }) {
  const chat = useChat();
  const live = useChatState((state) => state.live !== null);
  const stopping = useChatState((state) => state.live?.phase === "stopping");
  const pending = useChatState((state) => state.pending !== null);
  const [words, setWords] = useWords(props.session ?? NEW);
  const area = useRef<HTMLTextAreaElement>(null);
  const busy = live || pending;

  useEffect(() => {
    area.current?.focus({ preventScroll: true });
  }, []);
  useLayoutEffect(() => {
    const element = area.current;
    if (element === null) return;
    element.style.height = "auto";
    element.style.height = `${element.scrollHeight}px`;
  }, [words]);

  const send = () => {
    const said = words.trim();
    if (said === "" || busy) return;
    setWords("");
    void chat.send(said);
  };

  return (
    <form
      className="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <div className="composer-field">
        <textarea
          id="composer"
          ref={area}
          rows={1}
          aria-label="What to say"
          placeholder="Say something"
          value={words}
          onChange={(event) => setWords(event.target.value)}
          onKeyDown={(event) => {
            if (isComposing(event.nativeEvent)) return;
            if (event.key === "Enter" && !event.shiftKey) {
              event.preventDefault();
              send();
            }
            if (event.key === "ArrowUp" && words === "" && !busy) {
              event.preventDefault();
              props.onEditLast();
            }
          }}
        />
        {busy ? (
          <button
            type="button"
            className="send send-stop"
            aria-label="Stop"
            title="Stop (Esc)"
            disabled={stopping}
            onClick={() => void chat.stop()}
          >
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            className="send"
            aria-label="Send"
            title="Send (Enter)"
            disabled={words.trim() === ""}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
      <ContextMeter words={words} />
    </form>
  );
}
