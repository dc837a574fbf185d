import { LAYERS_TOKENS, type ModelFacts } from "../../api/inspect";
import { CutNote } from "./CutNote";
import { Waiting } from "./Waiting";
import { useLayers, type Layers } from "./layers";
import { label, percent, wash } from "./words";

const BEFORE = 5;
const AFTER = 3;

/** What each layer would say if it were the last one. */
export function LogitLens(props: {
  ids: readonly number[];
  selected: number;
  model: ModelFacts;
  onSelect: (index: number) => void;
}) {
  const layers = useLayers(props.ids, props.selected, props.model);
  return (
    <div>
      <p className="ms-lede">
        Each row asks a layer what it would say next if the LM head read it already; the last
        layer’s word is the model’s. Ringed is the token that really stands there: see in which
        layer it is found first.
      </p>
      <Waiting of={layers} what="All layers are read…">
        {(value) => <Table {...props} layers={value} />}
      </Waiting>
    </div>
  );
}

function Table(props: {
  layers: Layers;
  selected: number;
  model: ModelFacts;
  onSelect: (index: number) => void;
}) {
  const { answer, from } = props.layers;
  const here = props.selected - from;
  const first = Math.max(1, here - BEFORE);
  const columns = answer.tokens
    .map((token, at) => ({ token, at }))
    .slice(first, Math.min(answer.tokens.length, here + AFTER + 1));
  if (columns.length === 0) return <p className="ms-note">Nothing stands before this token.</p>;
  const rows = [...(answer.layers ?? [])].reverse();
  return (
    <>
      <CutNote from={from} limit={LAYERS_TOKENS} />
      <div className="ms-scroll" tabIndex={0} role="group" aria-label="Logit lens, scrollable">
        <table className="ms-table ms-lens">
          <caption className="ms-hidden">The most probable next token by layer</caption>
          <thead>
            <tr>
              <th scope="col">in place of</th>
              {columns.map(({ token, at }) => (
                <th key={at} scope="col" aria-current={at === here ? "true" : undefined}>
                  <button type="button" onClick={() => props.onSelect(from + at)}>
                    {label(token, 10)}
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => (
              <tr key={row.layer}>
                <th scope="row">layer {row.layer}</th>
                {columns.map(({ token, at }) => {
                  const guess = row.lens[at - 1];
                  if (guess === undefined) return <td key={at} />;
                  return (
                    <td
                      key={at}
                      className={guess.id === token.id ? "ms-right" : undefined}
                      style={{ background: wash(guess.prob) }}
                      title={`${label(guess, 40)}, ${percent(guess.prob)}`}
                    >
                      {label(guess, 10)}
                      {guess.id === token.id && <span className="ms-hidden"> (is it)</span>}
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <p className="ms-note">
        The stronger the colour, the surer.
        {rows.length < props.model.blocks &&
          ` The text is long: ${rows.length} of the ${props.model.blocks} layers were asked.`}
      </p>
    </>
  );
}
