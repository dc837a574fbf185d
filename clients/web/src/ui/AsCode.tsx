import { useState } from "react";
import { asCurl, asPython, type Message } from "../state/asCode";
import { pathTo, textOf } from "../state/tree";
import { useChatState } from "./context";
import { Dialog } from "./Dialog";
import { keptWords } from "./kept";
import { Code } from "./prose/Code";

/** The open conversation as a request, with what is half written as its last message. */
export function AsCode({ keyed, onClose }: { keyed: boolean; onClose: () => void }) {
  const open = useChatState((state) => state.open);
  const draft = useChatState((state) => state.draft);
  const model = useChatState((state) => state.model);
  const [language, setLanguage] = useState<"bash" | "python">("bash");
  const path = open === null ? [] : pathTo(open.turns, open.session.head);
  const instructions = open === null ? draft.instructions : open.session.instructions;
  const messages: Message[] = path.map((turn) => ({ role: turn.role, content: textOf(turn) }));
  if (instructions) messages.unshift({ role: "system", content: instructions });
  const words = keptWords(open?.session.id ?? null).trim();
  if (words !== "") messages.push({ role: "user", content: words });
  else if (messages.at(-1)?.role === "assistant") messages.pop();
  if (messages.length === 0) messages.push({ role: "user", content: "Hello" });
  const sampling = open?.session.defaults ?? draft.defaults;
  const make = language === "bash" ? asCurl : asPython;
  const code = make(location.origin, model?.id ?? "default", messages, sampling, keyed);
  return (
    <Dialog title="The same request from elsewhere" onClose={onClose}>
      <div className="choice" role="radiogroup" aria-label="Language">
        {(["bash", "python"] as const).map((name) => (
          <label key={name}>
            <input
              type="radio"
              name="language"
              checked={language === name}
              onChange={() => setLanguage(name)}
            />
            {name === "bash" ? "curl" : "Python"}
          </label>
        ))}
      </div>
      <Code text={code} language={language} />
    </Dialog>
  );
}
