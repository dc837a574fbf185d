import { useLayoutEffect } from "react";
import { useChat, useChatState } from "./context";
import { keptWords } from "./kept";

/** What is half written at `of`, and how to change it (null: it is done with); `otherwise` where
 * nothing is. It is kept outside the component, and over a reload. */
export function useWords(of: string, otherwise = ""): [string, (text: string | null) => void] {
  const { store } = useChat();
  const words = useChatState((state) => state.words[of]) ?? (keptWords(of) || otherwise);
  const write = (text: string | null) => store.dispatch({ type: "words", of, text });
  useLayoutEffect(() => {
    // From here on the state has it.
    if (store.get().words[of] === undefined) write(words);
  }, [of]);
  return [words, write];
}
