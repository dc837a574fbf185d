import { useEffect, useRef, useState } from "react";
import { useChat, useChatState } from "./context";

/** A screen reader is told whole sentences now and then, not every token. */
const EVERY_MS = 4000;

export function Announcer() {
  const { store } = useChat();
  const generation = useChatState((state) => state.live?.generation ?? null);
  const [said, setSaid] = useState("");
  const answering = useRef(false);
  useEffect(() => {
    if (generation === null) {
      if (answering.current) setSaid("The answer has ended.");
      answering.current = false;
      return undefined;
    }
    answering.current = true;
    setSaid("Answering.");
    let told = 0;
    const timer = setInterval(() => {
      const text = store.get().live?.text ?? "";
      const end = lastSentenceEnd(text);
      if (end > told) setSaid(text.slice(told, end));
      told = Math.max(told, end);
    }, EVERY_MS);
    return () => clearInterval(timer);
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
