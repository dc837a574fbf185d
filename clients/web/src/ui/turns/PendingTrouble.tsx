import { useEffect, useState } from "react";
import type { Trouble } from "../../state/state";
import { useChat } from "../context";

const HEADLINES: Record<string, string> = {
  queue_full: "The server is full.",
  rate_limited: "That was too much at once.",
  engine_starting: "The model is being loaded.",
  engine_restarting: "The engine is being restarted.",
  server_draining: "The server is being stopped.",
  session_busy: "This session is answering already.",
  context_length_exceeded: "The context is full.",
  unreachable: "The server cannot be reached.",
};

/** Why what was said was not taken, and what can be done. */
export function PendingTrouble({ trouble }: { trouble: Trouble }) {
  const chat = useChat();
  const left = useCountdown(trouble.retryAt);
  return (
    <div className="trouble turn-trouble" role="alert">
      <p>
        <strong>{HEADLINES[trouble.code] ?? "That did not work."}</strong> {trouble.message}
      </p>
      <div className="edit-tools">
        {left !== null && <span className="note">Trying again in {left} s.</span>}
        <button type="button" className="button button-quiet" onClick={() => chat.dropPending()}>
          Give up
        </button>
        <button type="button" className="button" onClick={() => void chat.retry()}>
          Try again
        </button>
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
