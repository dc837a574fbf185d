import { useEffect } from "react";
import { useChat, useChatState } from "./context";

const STARTERS = [
  {
    text: "Write an email apologizing to Sarah for the tragic gardening mishap. Explain how it happened.",
    why: "A small model, a whole letter: watch it stream.",
  },
  {
    text: "Sarah fed the cat because it",
    why: "Then open its tokens, and see which words “it” looks at.",
  },
  {
    text: "Explain in three sentences what a KV cache is.",
    why: "Then open the session's own cache.",
  },
];

/** What this is, three ways to begin, and the model that answers. */
export function FirstScreen() {
  const chat = useChat();
  const model = useChatState((state) => state.model);
  const speed = useChatState((state) => state.meanSpeed);
  useEffect(() => {
    if (model !== null && chat.store.get().meanSpeed === null) void chat.measureSpeed();
  }, [chat, model]);
  return (
    <div className="first">
      <h1 className="first-line">
        A text-generation server that remembers, resumes, and lets you look inside.
      </h1>
      <ul className="starters">
        {STARTERS.map((starter) => (
          <li key={starter.text}>
            <button type="button" className="starter" onClick={() => void chat.send(starter.text)}>
              <span className="starter-text">{starter.text}</span>
              <span className="starter-why">{starter.why}</span>
            </button>
          </li>
        ))}
      </ul>
      {model !== null && (
        <dl className="plate">
          <Fact name="model" value={model.id} />
          {model.num_parameters !== undefined && (
            <Fact name="parameters" value={`${Math.round(model.num_parameters / 1e6)} M`} />
          )}
          {model.max_model_len !== undefined && (
            <Fact name="context" value={`${model.max_model_len.toLocaleString("en")} tokens`} />
          )}
          {model.device !== undefined && (
            <Fact
              name="runs on"
              value={[model.device, model.quantization?.split(" ")[0]].filter(Boolean).join(", ")}
            />
          )}
          <Fact
            name="speed"
            value={speed === null ? "measuring …" : `${Math.round(speed)} tokens/s`}
          />
        </dl>
      )}
    </div>
  );
}

function Fact({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}
