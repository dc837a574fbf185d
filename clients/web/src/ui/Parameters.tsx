import { useState } from "react";
import type { Session } from "../api/types";
import { fieldsOf, PARAMETERS, samplingOf } from "../state/sampling";
import { useChat, useChatState } from "./context";
import { Dialog } from "./Dialog";
import { keepDraft } from "./kept";
import { go } from "./place";

/** The system prompt and the sampling parameters: of the open session, or of the next one. */
export function Parameters({ onClose }: { onClose: () => void }) {
  const chat = useChat();
  const session = useChatState((state) => state.open?.session ?? null);
  const draft = useChatState((state) => state.draft);
  const defaults = useChatState((state) => state.model?.sampling_defaults);
  const [fields, setFields] = useState(() => fieldsOf(session?.defaults ?? draft.defaults));
  const [instructions, setInstructions] = useState(
    session === null ? draft.instructions : (session.instructions ?? ""),
  );
  const [overflow, setOverflow] = useState<Session["overflow"]>(
    session?.overflow ?? draft.overflow,
  );
  const [error, setError] = useState<string | null>(null);
  const fixed = session !== null;
  const changed = fixed && instructions !== (session.instructions ?? "");

  function save(anew: boolean) {
    try {
      const sampling = samplingOf(fields);
      if (!fixed || anew) {
        const next = { instructions, overflow, defaults: sampling };
        if (anew) go({ session: null, view: "text" });
        chat.store.dispatch({ type: "draft", draft: next });
        keepDraft(next);
      } else {
        // What the page does not show (a response format) stays as it is.
        const shown = new Set<string>([...PARAMETERS.map(({ name }) => name), "stop"]);
        const rest = Object.entries(session.defaults).filter(([name]) => !shown.has(name));
        void chat.setDefaults({ ...Object.fromEntries(rest), ...sampling });
      }
      onClose();
    } catch (cause) {
      setError(cause instanceof Error ? cause.message : String(cause));
    }
  }

  return (
    <Dialog title={fixed ? "This session" : "The next session"} onClose={onClose}>
      <form
        className="parameters"
        onSubmit={(event) => {
          event.preventDefault();
          save(false);
        }}
      >
        <label className="field field-wide">
          <span className="field-name">System prompt</span>
          <textarea
            rows={3}
            value={instructions}
            aria-describedby="instructions-note"
            onChange={(event) => setInstructions(event.target.value)}
          />
          <span id="instructions-note" className="note">
            {fixed
              ? "It stands before every turn of this session and cannot change in it."
              : "It stands before every turn. Empty: the model's own."}
          </span>
        </label>
        {changed && (
          <button type="button" className="button" onClick={() => save(true)}>
            Begin a new session with it
          </button>
        )}
        <div className="field-grid">
          {PARAMETERS.map(({ name, label, what }) => (
            <label key={name} className="field">
              <span className="field-name">{label}</span>
              <input
                type="text"
                inputMode="decimal"
                value={fields[name] ?? ""}
                placeholder={defaults?.[name]?.toString() ?? "not set"}
                onChange={(event) => setFields({ ...fields, [name]: event.target.value })}
              />
              <span className="note">{what}</span>
            </label>
          ))}
          <label className="field">
            <span className="field-name">Stop texts</span>
            <textarea
              rows={2}
              value={fields["stop"] ?? ""}
              placeholder="one a line"
              onChange={(event) => setFields({ ...fields, stop: event.target.value })}
            />
            <span className="note">an answer ends before any of them</span>
          </label>
          <label className="field">
            <span className="field-name">When the context is full</span>
            <select
              value={overflow}
              disabled={fixed}
              onChange={(event) => setOverflow(event.target.value as Session["overflow"])}
            >
              <option value="error">say so</option>
              <option value="drop_oldest">leave out the oldest turns</option>
            </select>
          </label>
        </div>
        {error !== null && (
          <p role="alert" className="trouble">
            {error}
          </p>
        )}
        <div className="edit-tools">
          <button
            type="button"
            className="button button-quiet"
            onClick={() => setFields(fieldsOf({}))}
          >
            Reset
          </button>
          <button type="submit" className="button button-primary">
            Save
          </button>
        </div>
      </form>
    </Dialog>
  );
}
