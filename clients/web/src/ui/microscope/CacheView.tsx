import { useId, useState } from "react";

import { readCache, readModel, readTokens, spell, type ModelFacts } from "../../api/inspect";
import type { CacheReport } from "../../api/types";
import { pathTokens } from "../../state/inspect";
import { bytes, numberBytes, reuse, whyComputed, type Tier } from "../../state/inspect-cache";
import { Waiting } from "./Waiting";
import { useLoaded } from "./loaded";
import { label, percent, whole } from "./words";

const TIERS: readonly { tier: Tier; name: string; means: string }[] = [
  { tier: "device", name: "in memory", means: "ready at once" },
  { tier: "host", name: "in the host’s memory", means: "copied to the device first" },
  { tier: "disk", name: "on disk", means: "read before it is used; survives a restart" },
  { tier: "none", name: "not kept", means: "would be computed" },
];

interface Shown {
  report: CacheReport;
  model: ModelFacts;
  /** The tokens of the path, where they can be told. */
  ids: number[];
}

/** Where a conversation's keys and values are, and what the last answer took from there. */
export function CacheView(props: { sessionId: string }) {
  const { sessionId } = props;
  const heading = useId();
  const [count, setCount] = useState(0);
  const shown = useLoaded<Shown>(
    `${sessionId} ${count}`,
    async (signal) => {
      const [report, model, session] = await Promise.all([
        readCache(sessionId, signal),
        readModel(signal),
        readTokens(sessionId, signal),
      ]);
      const path = session.head === null ? null : pathTokens(session.turns, session.head);
      return { report, model, ids: path?.ids ?? [] };
    },
    { keep: false },
  );
  return (
    <section className="ms" aria-labelledby={heading}>
      <header className="ms-head">
        <h2 id={heading}>KV cache</h2>
        <button type="button" className="button" onClick={() => setCount((n) => n + 1)}>
          Look again
        </button>
      </header>
      <p className="ms-lede">
        For every token each layer keeps a key and a value, so that the next token need not compute
        the past again. They lie in blocks; each square below is one, coloured by where it is now.
      </p>
      <Waiting of={shown} what="The blocks are looked up…">
        {(value) => <Blocks key={count} {...value} />}
      </Waiting>
    </section>
  );
}

function Blocks(props: Shown) {
  const { report, model } = props;
  const [chosen, setChosen] = useState<number | null>(null);
  if (report.tokens === 0) {
    return <p className="ms-note">This conversation has no tokens yet.</p>;
  }
  const tail = report.tokens % report.block_size;
  return (
    <>
      <ul className="ms-key">
        {TIERS.filter(({ tier }) => report.tiers[tier] > 0).map(({ tier, name, means }) => (
          <li key={tier}>
            <span className={`ms-swatch ms-tier-${tier}`} aria-hidden="true" />
            <b>{whole(report.tiers[tier])}</b> {name} <span className="ms-note">({means})</span>
          </li>
        ))}
      </ul>
      <div className="ms-blocks" role="group" aria-label="Blocks">
        {report.blocks.map((block) => (
          <button
            key={block.index}
            type="button"
            className={`ms-block-cell ms-tier-${block.tier}`}
            aria-pressed={chosen === block.index}
            aria-label={`Block ${block.index + 1}, tokens ${block.start + 1} to ${block.end}, ${
              TIERS.find(({ tier }) => tier === block.tier)?.name ?? block.tier
            }`}
            onClick={() => setChosen(chosen === block.index ? null : block.index)}
          />
        ))}
        {tail > 0 && (
          <span
            className="ms-block-cell ms-tail"
            role="img"
            aria-label={`${tail} tokens in a block that is not full yet`}
            title={`${tail} tokens in a block that is not full yet`}
          />
        )}
      </div>
      {chosen === null ? (
        <p className="ms-note">
          Choose a block to read the words in it. One holds {report.block_size} tokens.
        </p>
      ) : (
        <Words report={report} ids={props.ids} index={chosen} />
      )}
      <dl className="ms-facts">
        <Fact name="tokens" value={whole(report.tokens)} />
        <Fact name="bytes per token" value={bytes(model.kv_bytes_per_token)} />
        <Fact
          name="kept in all"
          value={bytes(model.kv_bytes_per_token * (report.tokens - report.tiers.none))}
        />
        <Fact name="on disk too" value={`${whole(report.on_disk)} tokens`} />
      </dl>
      <p className="ms-note">
        A token’s share: 2 (key and value) × {model.blocks} layers × {model.kv_heads} heads ×{" "}
        {model.head_dim} numbers × {numberBytes(model)} bytes.
      </p>
      <LastTurn report={report} />
    </>
  );
}

function Fact(props: { name: string; value: string }) {
  return (
    <div>
      <dt>{props.name}</dt>
      <dd>{props.value}</dd>
    </div>
  );
}

function Words(props: { report: CacheReport; ids: readonly number[]; index: number }) {
  const block = props.report.blocks[props.index];
  const ids = block === undefined ? [] : props.ids.slice(block.start, block.end);
  const words = useLoaded(ids.length === 0 ? null : `words ${ids.join(",")}`, (signal) =>
    spell([...ids], signal),
  );
  if (block === undefined) return null;
  return (
    <div role="status">
      <p className="ms-note">
        Block {block.index + 1}: tokens {block.start + 1} to {block.end}
        {block.device && block.disk && ", in memory and on disk"}
      </p>
      <Waiting of={words} what="…">
        {(text) => <p className="ms-words">{text}</p>}
      </Waiting>
    </div>
  );
}

function LastTurn(props: { report: CacheReport }) {
  const { report } = props;
  const last = report.last_turn;
  const parts = reuse(report);
  const { miss } = last ?? { miss: null };
  return (
    <>
      <h3>What the last answer found</h3>
      {last !== null && (
        <>
          <div className="ms-reuse" aria-hidden="true">
            {parts.map(({ tier, tokens }) => (
              <span
                key={tier}
                className={`ms-tier-${tier}`}
                style={{ flexGrow: tokens }}
                title={`${whole(tokens)} tokens`}
              />
            ))}
          </div>
          <table className="ms-table">
            <caption className="ms-hidden">
              The prompt of the last answer by where it was found
            </caption>
            <thead>
              <tr>
                <th scope="col">Of its prompt</th>
                <th scope="col" className="ms-number">
                  Tokens
                </th>
                <th scope="col" className="ms-number">
                  Share
                </th>
              </tr>
            </thead>
            <tbody>
              {parts.map(({ tier, tokens }) => (
                <tr key={tier}>
                  <th scope="row">
                    <span className={`ms-swatch ms-tier-${tier}`} aria-hidden="true" />
                    {tier === "none"
                      ? "computed"
                      : `found ${TIERS.find((one) => one.tier === tier)?.name ?? tier}`}
                  </th>
                  <td className="ms-number">{whole(tokens)}</td>
                  <td className="ms-number">{percent(tokens / last.prompt_tokens)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </>
      )}
      <p>{whyComputed(report)}</p>
      {miss !== null && (miss.before !== undefined || miss.after !== undefined) && (
        <dl className="ms-facts ms-miss">
          <Fact name="there was" value={label({ text: miss.before ?? "" }, 60)} />
          <Fact name="there is" value={label({ text: miss.after ?? "" }, 60)} />
        </dl>
      )}
    </>
  );
}
