import { useEffect, useState } from "react";
import type { Trouble } from "../../state/state";
import { useChat, useChatState } from "../context";

const HEADLINES: Record<string, string> = {
  queue_full: "The server is full.",
  rate_limited: "That was too much at once.",
  engine_starting: "The model is being loaded.",
  engine_restarting: "The engine is being restarted.",
  server_draining: "The server is being stopped.",
  session_busy: "Not sent yet.",
  context_length_exceeded: "The context is full.",
  unreachable: "The server cannot be reached.",
};

/** The same words are refused again. */
const HOPELESS = ["context_length_exceeded", "request_too_large", "invalid_value"];

/** Why what was asked for was not taken, and what can be done. `words`: there are some to edit. */
export function PendingTrouble({ trouble, words }: { trouble: Trouble; words: boolean }) {
  const chat = useChat();
  const left = useCountdown(trouble.retryAt);
  const answering = useChatState((state) => state.live !== null);
  const busy = trouble.code === "session_busy";
  const hopeless = HOPELESS.includes(trouble.code);
  const edit = () => {
    void chat.stop();
    document.getElementById("composer")?.focus();
  };
  return (
    <div className="trouble turn-trouble" role="alert">
      <p>
        <strong>{HEADLINES[trouble.code] ?? "That did not work."}</strong> {trouble.message}
        {busy &&
          (answering
            ? " You can send this when that answer has ended."
            : " That answer has ended: you can send this now.")}
      </p>
      <div className="edit-tools">
        {left !== null && <span className="note">Trying again in {left} s.</span>}
        {hopeless && words ? (
          <button type="button" className="button" onClick={edit}>
            Edit
          </button>
        ) : (
          <button type="button" className="button button-quiet" onClick={edit}>
            Give up
          </button>
        )}
        {!hopeless && (
          <button
            type="button"
            className="button"
            disabled={busy && answering}
            onClick={() => void chat.retry()}
          >
            {busy ? "Send" : "Try again"}
          </button>
        )}
      </div>
    </div>
  );
}

function useCountdown(until: number | null): number | null {
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    if (until === null) return undefined;
    const timer = setInterval(() => setNow(Date.now()), 500);
    return () => clearInterval(timer);
  }, [until]);
  return until === null ? null : Math.max(Math.ceil((until - now) / 1000), 0);
}
