import { useEffect, useState } from "react";
import type { Tiers, Turn } from "../../api/types";
import { speedOf, type Facts, type Live } from "../../state/live";

const number = (value: number) => value.toLocaleString("en");
const time = (ms: number) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** The instruments beside an answer that is being written. */
export function LiveMargin({ live }: { live: Live }) {
  const speed = speedOf(live);
  return (
    <dl className="margin-list">
      <Row name="now" value={<LivePhase live={live} />} />
      {live.cached !== null && live.promptTokens !== null && (
        <Prompt tokens={live.promptTokens} cached={live.cached} />
      )}
      {live.tokens > 0 && <Row name="tokens" value={number(live.tokens)} />}
      {speed !== null && <Row name="speed" value={`${Math.round(speed)} tokens/s`} />}
    </dl>
  );
}

/** Beside an answer that was asked for. */
export function SendingMargin() {
  const waited = useSeconds(true);
  return (
    <dl className="margin-list">
      <Row name="now" value={`sending${waited > 2 ? ` ${waited} s` : ""}`} />
    </dl>
  );
}

/** The instruments beside an answer that has ended. */
export function EndedMargin({ turn, facts }: { turn: Turn; facts: Facts | undefined }) {
  const details = facts?.usage.prompt_tokens_details;
  return (
    <dl className="margin-list">
      {facts !== undefined && <Row name="first token" value={time(facts.timings.ttft_ms)} />}
      {facts !== undefined && facts.timings.decode_tokens_per_s > 0 && (
        <Row name="speed" value={`${Math.round(facts.timings.decode_tokens_per_s)} tokens/s`} />
      )}
      {turn.num_tokens > 0 && <Row name="tokens" value={number(turn.num_tokens)} />}
      {facts !== undefined && details !== undefined && (
        <Prompt tokens={facts.usage.prompt_tokens} cached={details} />
      )}
      {turn.finish_reason !== null && turn.finish_reason !== "stop" && (
        <Row name="ended" value={ENDINGS[turn.finish_reason] ?? turn.finish_reason} />
      )}
    </dl>
  );
}

const ENDINGS: Record<string, string> = {
  length: "at its limit",
  abort: "stopped",
  error: "broken off",
  tool_calls: "with a call",
};

function Prompt({ tokens, cached }: { tokens: number; cached: Tiers }) {
  const tiers = (["device", "host", "disk"] as const).filter((tier) => cached[tier] > 0);
  const computed = tokens - cached.device - cached.host - cached.disk;
  return (
    <>
      <Row name="prompt" value={`${number(tokens)} tokens`} />
      {tiers.map((tier) => (
        <Row
          key={tier}
          name={`from ${tier === "device" ? "memory" : tier}`}
          value={number(cached[tier])}
        />
      ))}
      <Row name="computed" value={number(computed)} />
    </>
  );
}

function Row({ name, value }: { name: string; value: React.ReactNode }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

/** What is going on, in a few words. */
export function LivePhase({ live }: { live: Live }) {
  const waited = useSeconds(live.phase === "sent" || live.phase === "queued");
  switch (live.phase) {
    case "sent":
      return <>waiting{waited > 2 && ` ${waited} s`}</>;
    case "queued":
      return (
        <>
          in the queue
          {live.queuePosition !== null &&
            (live.queuePosition === 0 ? ", next" : `, ${live.queuePosition} before this`)}
        </>
      );
    case "prefill":
      return live.prefill === null ? (
        <>reading the prompt</>
      ) : (
        <>
          reading the prompt, {number(live.prefill.done)} of {number(live.prefill.total)}
          <progress
            max={live.prefill.total}
            value={live.prefill.done}
            aria-label="How much of the prompt is read"
          />
        </>
      );
    case "streaming":
      return <>writing</>;
    case "paused":
      return <>paused</>;
    case "lost":
      return <>no connection</>;
    case "stopping":
      return <>stopping</>;
    case "done":
    case "failed":
      return <>ended</>;
  }
}

/** Seconds since `running` became true. */
function useSeconds(running: boolean): number {
  const [seconds, setSeconds] = useState(0);
  useEffect(() => {
    setSeconds(0);
    if (!running) return undefined;
    const timer = setInterval(() => setSeconds((before) => before + 1), 1000);
    return () => clearInterval(timer);
  }, [running]);
  return seconds;
}
