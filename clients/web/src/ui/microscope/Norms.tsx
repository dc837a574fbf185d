import { LAYERS_TOKENS, type Layer, type ModelFacts } from "../../api/inspect";
import { ticks, toUnit } from "../../state/inspect-norms";
import { CutNote } from "./CutNote";
import { Waiting } from "./Waiting";
import { useLayers } from "./layers";
import { figure } from "./words";

const SERIES = [
  { name: "residual", title: "stream after the layer" },
  { name: "attention", title: "attention adds" },
  { name: "feed_forward", title: "feed-forward adds" },
] as const;

type Series = (typeof SERIES)[number]["name"];

/** How long a token's vector is after each layer, and what the layer's two halves added. */
export function Norms(props: { ids: readonly number[]; selected: number; model: ModelFacts }) {
  const layers = useLayers(props.ids, props.selected, props.model);
  return (
    <div>
      <p className="ms-lede">
        A token’s vector goes through the blocks, and each adds two things to it: first what
        attention fetched from earlier tokens, then what the feed-forward layer knows. The lines are
        the lengths of these vectors, layer by layer, on a scale where each step is ten times more.
      </p>
      <Waiting of={layers} what="All layers are read…">
        {({ answer, from }) => (
          <>
            <CutNote from={from} limit={LAYERS_TOKENS} />
            <Chart
              layers={answer.layers ?? []}
              blocks={props.model.blocks}
              at={props.selected - from}
            />
          </>
        )}
      </Waiting>
    </div>
  );
}

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [560, 250, 44, 26];

function Chart(props: { layers: readonly Layer[]; blocks: number; at: number }) {
  const { layers, blocks, at } = props;
  const value = (layer: Layer, series: Series) => layer.norms[series][at] ?? 0;
  const all = layers.flatMap((layer) => SERIES.map(({ name }) => value(layer, name)));
  const marks = ticks(all);
  const x = (layer: number) => LEFT + ((WIDTH - LEFT - 8) * layer) / Math.max(1, blocks - 1);
  const y = (length: number) => 8 + (HEIGHT - BOTTOM - 8) * (1 - toUnit(length, marks));
  const every = Math.max(1, Math.round(layers.length / 10));
  return (
    <figure className="ms-figure">
      <ul className="ms-key">
        {SERIES.map(({ name, title }) => (
          <li key={name} className={`ms-line-${name}`}>
            <svg width="26" height="10" aria-hidden="true">
              <line x1="0" x2="26" y1="5" y2="5" />
            </svg>
            {title}
          </li>
        ))}
      </ul>
      <svg className="ms-chart" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} aria-hidden="true">
        {marks.map((mark) => (
          <g key={mark}>
            <line className="ms-rule" x1={LEFT} x2={WIDTH - 8} y1={y(mark)} y2={y(mark)} />
            <text className="ms-axis" x={LEFT - 6} y={y(mark) + 4} textAnchor="end">
              {mark}
            </text>
          </g>
        ))}
        {layers.map((layer, i) =>
          i % every === 0 ? (
            <text
              key={layer.layer}
              className="ms-axis"
              x={x(layer.layer)}
              y={HEIGHT - 8}
              textAnchor="middle"
            >
              {layer.layer}
            </text>
          ) : null,
        )}
        {SERIES.map(({ name }) => (
          <polyline
            key={name}
            className={`ms-line ms-line-${name}`}
            points={layers.map((layer) => `${x(layer.layer)},${y(value(layer, name))}`).join(" ")}
          />
        ))}
      </svg>
      <details className="ms-details">
        <summary>As a table</summary>
        <table className="ms-table">
          <caption className="ms-hidden">Lengths of the token’s vectors by layer</caption>
          <thead>
            <tr>
              <th scope="col">Layer</th>
              {SERIES.map(({ name, title }) => (
                <th key={name} scope="col" className="ms-number">
                  {title}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {layers.map((layer) => (
              <tr key={layer.layer}>
                <th scope="row">{layer.layer}</th>
                {SERIES.map(({ name }) => (
                  <td key={name} className="ms-number">
                    {figure(value(layer, name))}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </details>
    </figure>
  );
}
