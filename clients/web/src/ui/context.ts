/** The page's one Chat, for every component. */

import { createContext, useContext } from "react";
import type { Chat } from "../state/chat";
import type { State } from "../state/state";
import { useStore } from "../state/store";

export const ChatContext = createContext<Chat | null>(null);

export function useChat(): Chat {
  const chat = useContext(ChatContext);
  if (chat === null) throw new Error("there is no Chat above this component");
  return chat;
}

/** A part of the state; it must be a part, not something made of it. */
export function useChatState<T>(select: (state: State) => T): T {
  return useStore(useChat().store, select);
}
