import { useEffect, useRef } from "react";

import { LAYERS_TOKENS, type ModelFacts } from "../../api/inspect";
import { CutNote } from "./CutNote";
import { Waiting } from "./Waiting";
import { useLayers, type Layers } from "./layers";
import { figure, label, percent, whole } from "./words";

const BEFORE = 2;
const AFTER = 1;
/** So much is seen beyond the chosen column, in pixels. */
const MARGIN = 24;

/** The model from the ids to the next token: one column a token, one row a step. */
export function Shapes(props: {
  ids: readonly number[];
  selected: number;
  model: ModelFacts;
  onSelect: (index: number) => void;
}) {
  const layers = useLayers(props.ids, props.selected, props.model);
  return (
    <div>
      <p className="ms-lede">
        All tokens go through the model at once, each in a column of its own; only attention lets a
        column read from those to its left. The shape of a step is that of all columns together.
      </p>
      <Waiting of={layers} what="All layers are read…">
        {(value) => <Columns {...props} layers={value} />}
      </Waiting>
    </div>
  );
}

function Columns(props: {
  layers: Layers;
  selected: number;
  model: ModelFacts;
  onSelect: (index: number) => void;
}) {
  const { model } = props;
  const { answer, from } = props.layers;
  const here = props.selected - from;
  const count = answer.tokens.length;
  const first = Math.max(0, here - BEFORE);
  const last = Math.min(count, here + AFTER + 1);
  const columns = Array.from({ length: last - first }, (_, i) => first + i);
  const length = (layer: number, at: number) =>
    figure(answer.layers?.find((one) => one.layer === layer)?.norms.residual[at] ?? 0);
  const rows: { step: string; cell: (at: number) => string; shape: string; block?: boolean }[] = [
    {
      step: "token ids",
      cell: (at) => whole(answer.tokens[at]?.id ?? 0),
      shape: shape(answer.shapes.input_ids),
    },
    {
      step: "embedding: a row of numbers for each id",
      cell: () => whole(model.hidden),
      shape: shape([1, count, model.hidden]),
    },
    {
      step: `block 0: attention with ${model.heads} heads, queries`,
      cell: () => `${model.heads} × ${model.head_dim}`,
      shape: shape([1, model.heads, count, model.head_dim]),
      block: true,
    },
    {
      step: `its keys and values of ${model.kv_heads} heads, kept in the cache`,
      cell: () => `2 × ${model.kv_heads} × ${model.head_dim}`,
      shape: shape([2, model.kv_heads, count, model.head_dim]),
      block: true,
    },
    {
      step: "feed-forward: wide, and back",
      cell: () => whole(model.feed_forward),
      shape: shape([1, count, model.feed_forward]),
      block: true,
    },
    {
      step: "the stream after block 0: its length",
      cell: (at) => length(0, at),
      shape: shape([1, count, model.hidden]),
    },
    {
      step: `the same ${model.blocks - 1} times more; after block ${model.blocks - 1}`,
      cell: (at) => length(model.blocks - 1, at),
      shape: shape([1, count, model.hidden]),
    },
    {
      step: "norm: the final vector of numbers",
      cell: () => whole(model.hidden),
      shape: shape(answer.shapes.hidden),
    },
    {
      step: "LM head: the best logit",
      cell: (at) => figure(answer.positions[at]?.top[0]?.logit ?? 0),
      shape: shape(answer.shapes.logits),
    },
    {
      step: "softmax: the most probable next token",
      cell: (at) => {
        const best = answer.positions[at]?.top[0];
        return best === undefined ? "" : `${label(best, 10)} ${percent(best.prob)}`;
      },
      shape: shape(answer.shapes.logits),
    },
  ];

  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const view = box.current;
    const column = view?.querySelector<HTMLElement>("th[aria-current]");
    if (!view || !column) return;
    const [outer, inner] = [view.getBoundingClientRect(), column.getBoundingClientRect()];
    // Only the table scrolls: scrollIntoView would move the page under the reader.
    if (inner.left < outer.left || inner.right > outer.right)
      view.scrollLeft += inner.right - outer.right + MARGIN;
  }, [here]);

  return (
    <>
      <CutNote from={from} limit={LAYERS_TOKENS} />
      <div ref={box} className="ms-scroll" tabIndex={0} role="group" aria-label="Shapes, scrollable">
        <table className="ms-table ms-shapes">
          <caption className="ms-hidden">The steps of the model, by token</caption>
          <thead>
            <tr>
              <th scope="col">step</th>
              <th scope="col" className="ms-shape">
                shape
              </th>
              {first > 0 && (
                <th scope="col" className="ms-more">
                  {whole(first)} before
                </th>
              )}
              {columns.map((at) => (
                <th key={at} scope="col" aria-current={at === here ? "true" : undefined}>
                  <button type="button" onClick={() => props.onSelect(from + at)}>
                    {label(answer.tokens[at] ?? { text: "" }, 10)}
                  </button>
                </th>
              ))}
              {last < count && (
                <th scope="col" className="ms-more">
                  {whole(count - last)} after
                </th>
              )}
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => (
              <tr key={row.step} className={row.block ? "ms-block" : undefined}>
                <th scope="row">{row.step}</th>
                <td className="ms-shape">{row.shape}</td>
                {first > 0 && <td className="ms-more">…</td>}
                {columns.map((at) => (
                  <td key={at} className={at === here ? "ms-here" : undefined}>
                    {row.cell(at)}
                  </td>
                ))}
                {last < count && <td className="ms-more">…</td>}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Parameters model={model} />
    </>
  );
}

const shape = (axes: readonly number[]): string => `[${axes.map(whole).join(", ")}]`;

const PARTS: Record<string, string> = {
  embedding: "embedding",
  attention: "attention",
  feed_forward: "feed-forward",
  norms: "norms",
  lm_head: "LM head",
};

/** Where the model's numbers are. */
function Parameters(props: { model: ModelFacts }) {
  const { model } = props;
  const total = model.parameters["total"] ?? 0;
  const parts = Object.entries(model.parameters).filter(
    ([name, count]) => name !== "total" && count > 0,
  );
  return (
    <>
      <h3>Where its {whole(total)} parameters are</h3>
      <div className="ms-scroll" tabIndex={0} role="group" aria-label="Parameters, scrollable">
        <table className="ms-table">
          <thead>
            <tr>
              <th scope="col">Part</th>
              <th scope="col">Share</th>
              <th scope="col" className="ms-number">
                Parameters
              </th>
            </tr>
          </thead>
          <tbody>
            {parts.map(([name, count]) => (
              <tr key={name}>
                <th scope="row">{PARTS[name] ?? name}</th>
                <td>
                  <span className="ms-bar">
                    <span className="ms-bar-track" aria-hidden="true">
                      <span
                        className="ms-bar-fill ms-bar-plain"
                        style={{ width: `${(100 * count) / total}%` }}
                      />
                    </span>
                    <span className="ms-bar-value">{percent(count / total)}</span>
                  </span>
                </td>
                <td className="ms-number">{whole(count)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <p className="ms-note">
        {model.tied_embeddings && "The LM head is the embedding’s own matrix. "}
        Matrices of each block:{" "}
        {Object.entries(model.projections)
          .map(([name, axes]) => `${name} ${axes.map(whole).join(" × ")}`)
          .join(", ")}
        . Weights: {model.quantization}. Kernels: {model.kernels.replace(/ [0-9a-f]{16,}$/, "")}.
      </p>
    </>
  );
}
