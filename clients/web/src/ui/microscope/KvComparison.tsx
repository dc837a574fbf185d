import { useEffect, useId, useRef, useState, type FormEvent } from "react";

import { ApiError } from "../../api/client";
import { compareKv, KV_TOKENS, type Clock, type KvRun } from "../../api/inspect";
import { clockAt, showSpeed } from "../../state/inspect-cache";
import { figure, whole } from "./words";

const PROMPT =
  "Write an email apologizing to Sarah for the tragic gardening mishap. Explain how it happened.";

/** A textbook's figures for the same comparison, on a T4 GPU, in seconds. */
const BOOK = { tokens: 100, with: 4.5, without: 21.8 };

/** The same answer made twice: with the cache, and computing the whole past for every token. */
export function KvComparison() {
  const heading = useId();
  const [prompt, setPrompt] = useState(PROMPT);
  const [tokens, setTokens] = useState(100);
  const [run, setRun] = useState<KvRun | null>(null);
  const [error, setError] = useState<string | null>(null);
  const running = useRef<AbortController | null>(null);
  const [busy, setBusy] = useState(false);

  useEffect(() => () => running.current?.abort(), []);

  async function start(event: FormEvent) {
    event.preventDefault();
    const leave = new AbortController();
    running.current = leave;
    setBusy(true);
    setError(null);
    try {
      setRun(await compareKv(prompt, tokens, leave.signal));
    } catch (cause) {
      if (!leave.signal.aborted)
        setError(cause instanceof ApiError ? cause.message : String(cause));
    } finally {
      if (running.current === leave) setBusy(false);
    }
  }

  return (
    <section className="ms" aria-labelledby={heading}>
      <header className="ms-head">
        <h2 id={heading}>The same answer twice</h2>
      </header>
      <p className="ms-lede">
        The model writes the same answer twice: once keeping the keys and values of what it has
        read, once computing all of it again for every new token. The clocks count the model’s
        forward passes and nothing else.
      </p>
      <form className="ms-form" onSubmit={(event) => void start(event)}>
        <label>
          Prompt
          <textarea
            rows={2}
            required
            value={prompt}
            onChange={(event) => setPrompt(event.target.value)}
          />
        </label>
        <label>
          Tokens
          <input
            type="number"
            min={1}
            max={KV_TOKENS}
            required
            value={tokens}
            onChange={(event) => setTokens(Number(event.target.value))}
          />
        </label>
        {busy ? (
          <button type="button" className="button" onClick={() => running.current?.abort()}>
            Stop
          </button>
        ) : (
          <button type="submit" className="button button-primary">
            Run both
          </button>
        )}
      </form>
      <p className="ms-wait" role="status">
        {busy && "Both are running. The one without takes a while…"}
      </p>
      {error !== null && (
        <p className="ms-error" role="alert">
          {error}
        </p>
      )}
      {run !== null && !busy && <Clocks key={JSON.stringify(run)} run={run} />}
    </section>
  );
}

function Clocks(props: { run: KvRun }) {
  const { run } = props;
  const speed = showSpeed(run);
  const [elapsed, again] = useElapsed(run.without_cache.seconds, speed);
  return (
    <div>
      <div className="ms-clocks">
        <ClockFace name="with the cache" clock={run.with_cache} run={run} elapsed={elapsed} />
        <ClockFace name="without" clock={run.without_cache} run={run} elapsed={elapsed} />
      </div>
      <p className="ms-row">
        <span className="ms-note">
          Shown {speed === 1 ? "as fast as it was" : `${speed} times as fast as it was`}.
        </span>
        <button type="button" className="button button-quiet" onClick={again}>
          Play again
        </button>
      </p>
      <p role="status">
        <b>{figure(run.speedup)} times</b> as fast with the cache, and{" "}
        {run.tokens_equal ? "all tokens are the same" : "the tokens are not the same"}.
      </p>
      <div className="ms-scroll" tabIndex={0} role="group" aria-label="Figures, scrollable">
        <table className="ms-table">
          <caption className="ms-hidden">Measured here, and in a book</caption>
          <thead>
            <tr>
              <th scope="col">Where</th>
              <th scope="col" className="ms-number">
                Tokens
              </th>
              <th scope="col" className="ms-number">
                With
              </th>
              <th scope="col" className="ms-number">
                Without
              </th>
              <th scope="col" className="ms-number">
                Times
              </th>
            </tr>
          </thead>
          <tbody>
            <tr>
              <th scope="row">here, now</th>
              <td className="ms-number">{whole(run.tokens)}</td>
              <td className="ms-number">{figure(run.with_cache.seconds)} s</td>
              <td className="ms-number">{figure(run.without_cache.seconds)} s</td>
              <td className="ms-number">{figure(run.speedup)}</td>
            </tr>
            <tr>
              <th scope="row">a textbook, on a T4 GPU</th>
              <td className="ms-number">{BOOK.tokens}</td>
              <td className="ms-number">{figure(BOOK.with)} s</td>
              <td className="ms-number">{figure(BOOK.without)} s</td>
              <td className="ms-number">{figure(BOOK.without / BOOK.with)}</td>
            </tr>
          </tbody>
        </table>
      </div>
      <details className="ms-details">
        <summary>The text that both wrote</summary>
        <p className="ms-words">{run.text}</p>
      </details>
    </div>
  );
}

function ClockFace(props: { name: string; clock: Clock; run: KvRun; elapsed: number }) {
  const { clock, run } = props;
  const now = clockAt(clock, run.tokens, props.elapsed);
  return (
    <div className="ms-clock" data-done={now.done}>
      <span className="ms-clock-name">{props.name}</span>
      <span className="ms-clock-time">{now.seconds.toFixed(2)} s</span>
      <span className="ms-clock-track" aria-hidden="true">
        <span className="ms-clock-fill" style={{ transform: `scaleX(${now.share})` }} />
      </span>
      <span className="ms-clock-tokens">
        {whole(now.tokens)} of {whole(run.tokens)} tokens, {figure(clock.tokens_per_s)} a second
      </span>
    </div>
  );
}

/** Seconds of the run's own time since it is shown, up to `end`; and a way to begin again. Who
 * wants no motion sees the end at once. */
function useElapsed(end: number, speed: number): [number, () => void] {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const [elapsed, setElapsed] = useState(still ? end : 0);
  const [plays, setPlays] = useState(0);
  useEffect(() => {
    if (still) return;
    const began = performance.now();
    let frame = requestAnimationFrame(function tick(now) {
      const seconds = (speed * (now - began)) / 1000;
      setElapsed(Math.min(seconds, end));
      if (seconds < end) frame = requestAnimationFrame(tick);
    });
    return () => cancelAnimationFrame(frame);
  }, [end, speed, still, plays]);
  return [elapsed, () => setPlays((count) => count + 1)];
}
