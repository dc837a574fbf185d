import { useId, useMemo, useReducer, useState } from "react";

import {
  FORWARD_TOKENS,
  forkAt,
  forward,
  readModel,
  readTokens,
  type ModelFacts,
} from "../../api/inspect";
import { readTree } from "../../api/routes";
import type { Session } from "../../api/types";
import {
  exampleIt,
  firstHead,
  firstLook,
  firstSurprise,
  look,
  NOUN_HEAD,
  pathTokens,
  penalties,
  seenTokens,
  summary,
  type SeenToken,
  type View,
} from "../../state/inspect";
import { pathTo } from "../../state/tree";
import { useChatState } from "../context";
import { Alternatives } from "./Alternatives";
import { AttentionMap } from "./AttentionMap";
import { LogitLens } from "./LogitLens";
import { Norms } from "./Norms";
import { Shapes } from "./Shapes";
import { Tabs } from "./Tabs";
import { TokenStrip } from "./TokenStrip";
import { Waiting } from "./Waiting";
import { useLoaded } from "./loaded";
import { figure, label, percent, whole } from "./words";

export interface MicroscopeProps {
  sessionId: string;
  /** An answer on the path to the session's head. */
  turnId: string;
  /** A fork was made at a token, and goes on already. */
  onForked(sessionId: string): void;
  onClose(): void;
}

const VIEWS: readonly { name: View; title: string }[] = [
  { name: "next", title: "Next token" },
  { name: "attention", title: "Attention" },
  { name: "lens", title: "Logit lens" },
  { name: "norms", title: "Norms" },
  { name: "shapes", title: "Shapes" },
];

/** Why there is nothing to look at. */
const NOTHING = {
  running: "The answer is still being written. It is shown here when it has ended.",
  elsewhere:
    "This answer lies on another branch than the one that is shown. Choose its branch in the text, " +
    "then open its tokens.",
  unknown: "There is no such turn in this conversation.",
  empty: "There are no tokens of this turn to look at.",
} as const;

interface Specimen {
  session: Session;
  ids: number[];
  start: number;
  tokens: SeenToken[];
  model: ModelFacts;
}

/** An answer under the microscope: its tokens, and for one of them all that led to the next. */
export function Microscope(props: MicroscopeProps) {
  const heading = useId();
  const { sessionId, turnId } = props;
  // The chat knows when an answer ends and when another branch is shown: then it is read again.
  const status = useChatState(({ open }) => open?.turns[turnId]?.status);
  const onPath = useChatState(
    ({ open }) =>
      open !== null && pathTo(open.turns, open.session.head).some(({ id }) => id === turnId),
  );
  const specimen = useLoaded<Specimen | keyof typeof NOTHING>(
    `${sessionId} ${turnId} ${status} ${onPath}`,
    async (signal) => {
      const session = await readTokens(sessionId, signal);
      const path = pathTokens(session.turns, turnId);
      if (path === null) {
        if (session.turns.some(({ id }) => id === turnId)) return "running";
        const { turns } = await readTree(sessionId);
        const turn = turns.find(({ id }) => id === turnId);
        if (turn === undefined) return "unknown";
        return turn.status === "running" ? "running" : "elsewhere";
      }
      if (path.ids.length === 0) return "empty";
      const from = Math.max(0, path.ids.length - FORWARD_TOKENS);
      const [answer, model] = await Promise.all([
        forward(path.ids.slice(from), [], signal),
        readModel(signal),
      ]);
      return { session, ...path, tokens: seenTokens(answer, from, path.start), model };
    },
    { keep: false },
  );

  return (
    <section className="ms" aria-labelledby={heading}>
      <header className="ms-head">
        <h2 id={heading}>Microscope</h2>
        <button type="button" className="button button-quiet" onClick={props.onClose}>
          Close
        </button>
      </header>
      <p className="ms-lede">
        The answer as the model made it: token after token, each coloured by how probable it was.
        Choose one to see what else could have stood there, and how the model came to it.
      </p>
      <Waiting of={specimen} what="The model reads the answer again…">
        {(value) =>
          typeof value === "string" ? (
            <p className="ms-note">{NOTHING[value]}</p>
          ) : (
            <Slide key={turnId} specimen={value} turnId={turnId} onForked={props.onForked} />
          )
        }
      </Waiting>
    </section>
  );
}

function Slide(props: {
  specimen: Specimen;
  turnId: string;
  onForked: (sessionId: string) => void;
}) {
  const { session, ids, start, tokens, model } = props.specimen;
  const set = penalties(
    session.defaults,
    useChatState((chat) => chat.model?.sampling_defaults),
  );
  const [prompt, setPrompt] = useState(start <= 120);
  const [state, dispatch] = useReducer(look, null, () => ({
    ...firstLook(firstSurprise(tokens, Math.min(start, ids.length - 1))),
    ...firstHead(model),
  }));
  const shown = useMemo(
    () => (prompt ? tokens : tokens.filter((token) => token.answer)),
    [prompt, tokens],
  );
  const seen = summary(tokens);
  const it = useMemo(() => exampleIt(tokens), [tokens]);
  const from = tokens[0]?.index ?? 0;
  const token = tokens[state.selected - from];
  const select = (index: number) => dispatch({ do: "select", index });

  function showPrompt(show: boolean) {
    setPrompt(show);
    if (!show && state.selected < start) select(Math.min(start, ids.length - 1));
  }

  if (token === undefined) return null;
  return (
    <div className="ms-slide">
      <div className="ms-specimen">
        <div className="ms-row">
          <Legend />
          <label className="ms-check">
            <input
              type="checkbox"
              checked={prompt}
              onChange={(event) => showPrompt(event.target.checked)}
            />
            with the prompt ({whole(start)} tokens)
          </label>
        </div>
        <TokenStrip tokens={shown} selected={state.selected} onSelect={select} />
        {from > 0 && (
          <p className="ms-note">
            The first {whole(from)} tokens are left out: {whole(FORWARD_TOKENS)} are read at a time.
          </p>
        )}
        {seen !== null && (
          <p className="ms-note">
            {whole(seen.tokens)} tokens, {whole(seen.notFirst)} of them not the model’s own
            first choice{set.length > 0 && ` (before ${set.join(", ")})`}. On average it was as
            undecided as between {figure(seen.perplexity)} equally likely tokens: its perplexity.
          </p>
        )}
      </div>
      <div className="ms-instruments">
        <p className="ms-selected">
          Token {whole(state.selected + 1)} of {whole(ids.length)}: <q>{label(token, 24)}</q>
          {token.drawn !== null && <> at {percent(token.drawn.prob)}</>}
        </p>
        <Tabs
          label="What to see of the token"
          tabs={VIEWS}
          chosen={state.view}
          onChoose={(view) => dispatch({ do: "view", view })}
        >
          {state.view === "next" && (
            <>
              <p className="ms-lede">
                The LM head turns the last vector into a score for each of the{" "}
                {whole(model.vocabulary)} tokens, and softmax turns the scores into probabilities.
                {token.answer
                  ? " Choose another one, and a copy of this conversation goes on from there."
                  : " This is what the model expected in a place that the prompt had filled."}
              </p>
              <p className="ms-note">
                These are the model’s own probabilities, before temperature, penalties, top p, top k
                and min p. With a penalty another token than the first can be drawn even at
                temperature 0.
                {set.length > 0 && ` Set in this conversation now: ${set.join(", ")}.`}
              </p>
              <Alternatives
                key={token.index}
                token={token}
                onChoose={async ({ id }) =>
                  props.onForked(await forkAt(session, props.turnId, token.index - start, id))
                }
              />
            </>
          )}
          {state.view === "attention" && (
            <>
              {it !== null && (
                <p className="ms-row">
                  <button
                    type="button"
                    className="button"
                    onClick={() => {
                      const { layer, head } = firstHead(model);
                      select(it);
                      dispatch({ do: "layer", layer });
                      dispatch({ do: "head", head });
                    }}
                  >
                    Look from “it”
                  </button>
                  {model.model === NOUN_HEAD.model && (
                    <span className="ms-note">
                      Layer {NOUN_HEAD.layer}, head {NOUN_HEAD.head} finds “cat” from there.
                    </span>
                  )}
                </p>
              )}
              <AttentionMap ids={ids} model={model} look={state} dispatch={dispatch} />
            </>
          )}
          {state.view === "lens" && (
            <LogitLens ids={ids} selected={state.selected} model={model} onSelect={select} />
          )}
          {state.view === "norms" && <Norms ids={ids} selected={state.selected} model={model} />}
          {state.view === "shapes" && (
            <Shapes ids={ids} selected={state.selected} model={model} onSelect={select} />
          )}
        </Tabs>
      </div>
    </div>
  );
}

function Legend() {
  return (
    <span className="ms-legend">
      <span>improbable</span>
      <span className="ms-ramp" aria-hidden="true" />
      <span>certain</span>
    </span>
  );
}
