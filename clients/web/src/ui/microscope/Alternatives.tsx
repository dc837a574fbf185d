import { useState } from "react";

import { ApiError } from "../../api/client";
import { pieces, type Alternative } from "../../api/inspect";
import type { SeenToken } from "../../state/inspect";
import { useLoaded } from "./loaded";
import { figure, label, percent, probabilityColour, whole } from "./words";

/** What the model would have said in a token's place, and another way to go on. */
export function Alternatives(props: {
  token: SeenToken;
  onChoose: (alternative: Alternative) => Promise<void>;
}) {
  const { token } = props;
  const [chosen, setChosen] = useState<number | null>(null);
  const [error, setError] = useState<string | null>(null);
  // Pieces of a character have no text of their own; they are told apart by their bytes.
  const halves = token.alternatives.filter(({ text }) => text.includes("\ufffd"));
  const ids = halves.map(({ id }) => id);
  const spelled = useLoaded(ids.length === 0 ? null : `pieces ${ids.join(",")}`, (signal) =>
    pieces(ids, signal),
  );
  const named = (alternative: Alternative) =>
    label(spelled.value?.find(({ id }) => id === alternative.id) ?? alternative, 24);

  async function choose(alternative: Alternative) {
    setChosen(alternative.id);
    setError(null);
    try {
      await props.onChoose(alternative);
    } catch (cause) {
      setError(cause instanceof ApiError ? cause.message : String(cause));
      setChosen(null);
    }
  }

  if (token.drawn === null) {
    return (
      <p className="ms-note">Nothing stands before this token, so nothing was expected here.</p>
    );
  }
  const { prob, rank } = token.drawn;
  const listed = token.alternatives.some(({ id }) => id === token.id);
  const logits = token.alternatives;
  const scale = Math.max(prob, ...logits.map((alternative) => alternative.prob));
  return (
    <div>
      <dl className="ms-facts">
        <div>
          <dt>token</dt>
          <dd>{label(token, 24)}</dd>
        </div>
        <div>
          <dt>id</dt>
          <dd>{whole(token.id)}</dd>
        </div>
        <div>
          <dt>probability</dt>
          <dd>{percent(prob)}</dd>
        </div>
        <div>
          <dt>rank</dt>
          <dd>{whole(rank)}</dd>
        </div>
        <div>
          <dt title="e to the entropy: as undecided as between so many equally likely tokens">
            undecided between
          </dt>
          <dd>{figure(Math.exp(token.entropy))} tokens</dd>
        </div>
      </dl>
      {error !== null && (
        <p className="ms-error" role="alert">
          {error}
        </p>
      )}
      <div className="ms-scroll">
        <table className="ms-table ms-bars">
          <caption className="ms-hidden">The most probable tokens in this place</caption>
          <thead>
            <tr>
              <th scope="col">Token</th>
              <th scope="col">Probability</th>
              <th scope="col" className="ms-number">
                Logit
              </th>
              <th scope="col">
                <span className="ms-hidden">Go on with it</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {token.alternatives.map((alternative) => (
              <tr
                key={alternative.id}
                className={alternative.id === token.id ? "ms-own" : undefined}
              >
                <th scope="row">{named(alternative)}</th>
                <td>
                  <Bar prob={alternative.prob} scale={scale} />
                </td>
                <td className="ms-number">{figure(alternative.logit)}</td>
                <td>
                  {alternative.id === token.id ? (
                    <span className="ms-note">{token.answer ? "was drawn" : "stands here"}</span>
                  ) : (
                    token.answer && (
                      <button
                        type="button"
                        className="button ms-choose"
                        disabled={chosen !== null}
                        onClick={() => void choose(alternative)}
                      >
                        {chosen === alternative.id ? "going on…" : "go on with it"}
                        <span className="ms-hidden">: {named(alternative)}</span>
                      </button>
                    )
                  )}
                </td>
              </tr>
            ))}
            {!listed && (
              <tr className="ms-own">
                <th scope="row">{label(token, 24)}</th>
                <td>
                  <Bar prob={prob} scale={scale} />
                </td>
                <td className="ms-number">–</td>
                <td>
                  <span className="ms-note">
                    {token.answer ? "was drawn" : "stands here"}, rank {whole(rank)}
                  </span>
                </td>
              </tr>
            )}
          </tbody>
        </table>
      </div>
    </div>
  );
}

function Bar(props: { prob: number; scale: number }) {
  return (
    <span className="ms-bar">
      <span className="ms-bar-track" aria-hidden="true">
        <span
          className="ms-bar-fill"
          style={{
            width: `${(100 * props.prob) / props.scale}%`,
            background: probabilityColour(props.prob),
          }}
        />
      </span>
      <span className="ms-bar-value">{percent(props.prob)}</span>
    </span>
  );
}
