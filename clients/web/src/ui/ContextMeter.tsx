import { useEffect, useState } from "react";
import { countTokens } from "../api/routes";
import { useChatState } from "./context";

/** From this share on, the meter warns; an answer still fits. */
const WARN_AT = 0.8;
/** An answer that finds less room than this is cut short soon. */
const SHORT_ROOM = 128;
const COUNT_AFTER_MS = 250;

/** Tokens of the conversation and of what is half written, against the model's context. */
export function ContextMeter({ words }: { words: string }) {
  const max = useChatState((state) => state.model?.max_model_len ?? null);
  const overflow = useChatState((state) => (state.open?.session ?? state.draft).overflow);
  const before = useChatState((state) =>
    state.live?.promptTokens != null
      ? state.live.promptTokens + state.live.streamed
      : state.pathTokens,
  );
  const typed = useTokens(words);
  if (max === null) return null;
  const used = (before ?? 0) + typed;
  const share = used / max;
  const left = Math.max(max - used, 0);
  const full = left < SHORT_ROOM;
  const state = full ? "full" : share >= WARN_AT ? "warn" : "calm";
  const drops = overflow === "drop_oldest";
  return (
    <div className="meter" data-state={state}>
      <meter
        min={0}
        max={max}
        high={WARN_AT * max}
        value={Math.min(used, max)}
        aria-label="Context in use"
      />
      <span>
        {used.toLocaleString("en")} / {max.toLocaleString("en")} tokens
      </span>
      {state !== "calm" && (
        <span role="status" className="meter-warning">
          {drops
            ? full
              ? "Full: the oldest turns will be left out."
              : "Nearly full: soon the oldest turns are left out."
            : full
              ? `Only ${left} tokens are left: fork an earlier turn, or begin a new session.`
              : `${left.toLocaleString("en")} tokens are left for all that follows.`}
        </span>
      )}
    </div>
  );
}

/** The text's tokens, counted by the server once the typing rests. */
function useTokens(text: string): number {
  const [count, setCount] = useState(0);
  useEffect(() => {
    if (text.trim() === "") {
      setCount(0);
      return undefined;
    }
    const asking = new AbortController();
    const timer = setTimeout(() => {
      countTokens(text, asking.signal).then(setCount, () => undefined);
    }, COUNT_AFTER_MS);
    return () => {
      clearTimeout(timer);
      asking.abort();
    };
  }, [text]);
  return count;
}
