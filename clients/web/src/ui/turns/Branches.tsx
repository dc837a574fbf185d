import { useChat, useChatState } from "../context";
import { IconButton } from "../Icon";

/** Arrows between a turn and those beside it: 2 of 3. */
export function Branches({ turn, siblings }: { turn: string; siblings: readonly string[] }) {
  const chat = useChat();
  const busy = useChatState((state) => state.live !== null || state.pending !== null);
  const at = siblings.indexOf(turn);
  if (siblings.length < 2 || at < 0) return null;
  const to = (index: number) => {
    const sibling = siblings[index];
    if (sibling !== undefined) void chat.switchTo(sibling);
  };
  return (
    <span className="branches" role="group" aria-label="Branches">
      <IconButton
        icon="left"
        label="Branch before"
        disabled={busy || at === 0}
        onClick={() => to(at - 1)}
      />
      <span className="branches-count">
        {at + 1}
        <span aria-hidden="true">/</span>
        <span className="hidden"> of </span>
        {siblings.length}
      </span>
      <IconButton
        icon="right"
        label="Branch after"
        disabled={busy || at === siblings.length - 1}
        onClick={() => to(at + 1)}
      />
    </span>
  );
}
