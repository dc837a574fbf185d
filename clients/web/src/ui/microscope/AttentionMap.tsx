import { useEffect, useRef, useState, type Dispatch } from "react";

import {
  attention,
  ATTENTION_TOKENS,
  type Attention,
  type ModelFacts,
  type Piece,
} from "../../api/inspect";
import { spanAround, type Look, type LookAction, type Measure } from "../../state/inspect";
import { queriesAround, strengths, strongest } from "../../state/inspect-attention";
import { AttentionGrid } from "./AttentionGrid";
import { CutNote } from "./CutNote";
import { HeadBars } from "./HeadBars";
import { Waiting } from "./Waiting";
import { useLoaded } from "./loaded";
import { figure, label, percent, running, wash } from "./words";

const MEASURES: readonly { name: Measure; title: string; means: string }[] = [
  { name: "scores", title: "Scores", means: "query times key, scaled: relevance before softmax" },
  { name: "weights", title: "Weights", means: "after softmax: they sum to 1" },
  {
    name: "values_share",
    title: "Shares",
    means: "weight times the length of the value: what each token really brings in",
  },
];

/** How much each earlier token counts for one, in a layer, by head. */
export function AttentionMap(props: {
  ids: readonly number[];
  model: ModelFacts;
  look: Look;
  dispatch: Dispatch<LookAction>;
}) {
  const { ids, model, look, dispatch } = props;
  const { selected, layer, head, measure, skipFirst } = look;
  const span = spanAround(ids.length, selected, ATTENTION_TOKENS);
  const part = ids.slice(span.from, span.to);
  const query = selected - span.from;
  const rows = queriesAround(part.length, query);
  const text = part.join(",");

  const heads = useLoaded(`heads ${layer} ${query} ${text}`, async (signal) => ({
    from: span.from,
    answer: await attention(part, layer, "all", [query], signal),
  }));
  const map = useLoaded(
    `map ${layer} ${head} ${rows[0]}-${rows.length} ${text}`,
    async (signal) => ({
      from: span.from,
      answer: await attention(part, layer, head, rows, signal),
    }),
  );

  return (
    <div>
      <p className="ms-lede">
        For each token a head scores the tokens before it and itself (query times key), and softmax
        makes the scores weights that sum to 1. The stronger a word’s colour, the more of its value
        goes into the ringed token; each head looks for something else.
      </p>
      <div className="ms-controls">
        <label>
          Layer {layer} (0 to {model.blocks - 1})
          <input
            type="range"
            min={0}
            max={model.blocks - 1}
            value={layer}
            aria-valuetext={`layer ${layer}`}
            onChange={(event) => dispatch({ do: "layer", layer: Number(event.target.value) })}
          />
        </label>
        <label>
          Head (0 to {model.heads - 1})
          <select
            value={head}
            onChange={(event) => dispatch({ do: "head", head: Number(event.target.value) })}
          >
            {Array.from({ length: model.heads }, (_, i) => (
              <option key={i} value={i}>
                {i}
              </option>
            ))}
          </select>
        </label>
        <label>
          Show
          <select
            value={measure}
            onChange={(event) =>
              dispatch({ do: "measure", measure: event.target.value as Measure })
            }
          >
            {MEASURES.map(({ name, title, means }) => (
              <option key={name} value={name} title={means}>
                {title}
              </option>
            ))}
          </select>
        </label>
        <label className="ms-check">
          <input
            type="checkbox"
            checked={skipFirst}
            onChange={(event) => dispatch({ do: "skipFirst", skipFirst: event.target.checked })}
          />
          leave out the first token
        </label>
      </div>
      <p className="ms-note">
        {MEASURES.find(({ name }) => name === measure)?.means}. Heads that find nothing put their
        weight on the first token.
      </p>
      <CutNote from={span.from} limit={ATTENTION_TOKENS} />
      <Waiting of={heads} what="The model looks…">
        {(value) => (
          <>
            <Reading
              heads={value.answer}
              map={map.value?.answer ?? null}
              from={value.from}
              look={look}
              onSelect={(key) => dispatch({ do: "select", index: value.from + key })}
            />
            <h3>All heads of layer {layer}</h3>
            <HeadBars
              answer={value.answer}
              look={look}
              onHead={(chosen) => dispatch({ do: "head", head: chosen })}
            />
          </>
        )}
      </Waiting>
      <h3>Head {head}, token by token</h3>
      <Waiting of={map} what="The map is drawn…">
        {(value) => (
          <AttentionGrid
            answer={value.answer}
            look={look}
            selected={selected - value.from}
            onSelect={(key) => dispatch({ do: "select", index: value.from + key })}
          />
        )}
      </Waiting>
    </div>
  );
}

/** The text, washed by what the token looks at; another token under the pointer shows its own. */
function Reading(props: {
  heads: Attention;
  map: Attention | null;
  /** The place in the text of the first token that is read. */
  from: number;
  look: Look;
  onSelect: (key: number) => void;
}) {
  const { heads, map, look } = props;
  const [pointed, setPointed] = useState<number | null>(null);
  const own = heads.queries[0] ?? 0;
  const elsewhere = pointed === null || map === null ? -1 : map.queries.indexOf(pointed);
  const query = elsewhere < 0 ? own : (pointed ?? own);
  const rowOf = (measure: Measure): number[] =>
    (elsewhere < 0 ? heads[measure][look.head]?.[0] : map?.[measure][0]?.[elsewhere]) ?? [];
  const row = rowOf(look.measure);
  const add = look.measure !== "scores";
  const washes = strengths(row, add, look.skipFirst);
  const top = strongest(row, 8, look.skipFirst && query > 0);
  const piece = heads.tokens[query];

  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const ringed = box.current?.querySelector<HTMLElement>(`[data-key="${own}"]`);
    if (!box.current || !ringed) return;
    box.current.scrollTop = ringed.offsetTop + ringed.offsetHeight + 8 - box.current.clientHeight;
  }, [own]);

  return (
    <>
      <div
        ref={box}
        className="ms-reading"
        role="group"
        aria-label="The text by what is looked at; the table tells the same"
        tabIndex={0}
        onPointerLeave={() => setPointed(null)}
        onPointerMove={(event) => {
          const at = (event.target as Element).closest<HTMLElement>("[data-key]");
          setPointed(at === null ? null : Number(at.dataset["key"]));
        }}
        onClick={(event) => {
          const at = (event.target as Element).closest<HTMLElement>("[data-key]");
          if (at !== null) props.onSelect(Number(at.dataset["key"]));
        }}
      >
        {heads.tokens.map((token, key) => (
          <span
            key={key}
            data-key={key}
            className={readingClass(token, key, query)}
            style={{ background: wash(washes[key] ?? 0) }}
          >
            {running(token)}
          </span>
        ))}
      </div>
      {piece !== undefined && (
        <p className="ms-note">
          <q>{label(piece)}</q>{" "}
          {query === 0 ? (
            "is the first token that is read: it can look at itself only."
          ) : (
            <>
              looks at{" "}
              {top.slice(0, 4).map(({ key, value }, i) => (
                <span key={key}>
                  {i > 0 && ", "}
                  <b>{label(heads.tokens[key] ?? { text: "" })}</b>{" "}
                  {add ? percent(value) : figure(value)}
                </span>
              ))}
              .
            </>
          )}
        </p>
      )}
      <details className="ms-details">
        <summary>As a table</summary>
        <table className="ms-table">
          <caption className="ms-hidden">
            What {piece === undefined ? "the token" : label(piece)} looks at, head {look.head}
          </caption>
          <thead>
            <tr>
              <th scope="col">Token</th>
              <th scope="col" className="ms-number">
                Score
              </th>
              <th scope="col" className="ms-number">
                Weight
              </th>
              <th scope="col" className="ms-number">
                Share
              </th>
            </tr>
          </thead>
          <tbody>
            {top.map(({ key }) => (
              <tr key={key}>
                <th scope="row">
                  {label(heads.tokens[key] ?? { text: "" })} <small>{props.from + key + 1}</small>
                </th>
                <td className="ms-number">{figure(rowOf("scores")[key] ?? 0)}</td>
                <td className="ms-number">{percent(rowOf("weights")[key] ?? 0)}</td>
                <td className="ms-number">{percent(rowOf("values_share")[key] ?? 0)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </details>
    </>
  );
}

function readingClass(token: Piece, key: number, query: number): string {
  const names = ["ms-word"];
  if (key === query) names.push("ms-query");
  if (key > query) names.push("ms-later");
  if (token.special) names.push("ms-special");
  return names.join(" ");
}
