import { useEffect, useState } from "react";
import { textOf } from "../state/tree";
import { useChat, useChatState } from "./context";

/** A screen reader is told whole sentences now and then, not every token. */
const EVERY_MS = 4000;

export function Announcer() {
  const { store } = useChat();
  const generation = useChatState((state) => state.live?.generation ?? null);
  const [said, setSaid] = useState("");
  useEffect(() => {
    if (generation === null) return undefined;
    setSaid("Answering.");
    const base = store.get().live?.base.length ?? 0;
    let told = 0;
    const timer = setInterval(() => {
      const text = store.get().live?.text ?? "";
      const end = lastSentenceEnd(text);
      if (end > told) setSaid(text.slice(told, end));
      told = Math.max(told, end);
    }, EVERY_MS);
    return () => {
      clearInterval(timer);
      const turns = Object.values(store.get().open?.turns ?? {});
      const turn = turns.find((one) => one.generation === generation);
      const rest = turn === undefined ? "" : textOf(turn).slice(base + told);
      setSaid(`${rest} The answer has ended.`.trim());
    };
  }, [generation, store]);
  return (
    <div className="hidden" role="status" aria-live="polite">
      {said}
    </div>
  );
}

function lastSentenceEnd(text: string): number {
  return Math.max(...[". ", "! ", "? ", "\n"].map((mark) => text.lastIndexOf(mark) + 1));
}
