import { useEffect } from "react";
import type { Notice } from "../state/state";
import { useChat, useChatState } from "./context";
import { IconButton } from "./Icon";

const SHOWN_MS = 9000;

export function Notices() {
  const notices = useChatState((state) => state.notices);
  return (
    <div className="notices" aria-live="polite">
      {notices.map((notice) => (
        <Shown key={notice.id} notice={notice} />
      ))}
    </div>
  );
}

function Shown({ notice }: { notice: Notice }) {
  const chat = useChat();
  useEffect(() => {
    if (notice.undo !== undefined) return undefined; // goes when it is too late to undo
    const timer = setTimeout(() => chat.troubles.dismiss(notice.id), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [chat, notice]);
  const undo = notice.undo;
  return (
    <div
      className={`notice notice-${notice.kind}`}
      role={notice.kind === "error" ? "alert" : undefined}
    >
      <span>{notice.text}</span>
      {undo !== undefined && (
        <button
          type="button"
          className="button button-quiet"
          onClick={() => {
            chat.sessions.undoRemove(undo);
            chat.troubles.dismiss(notice.id);
          }}
        >
          Undo
        </button>
      )}
      <IconButton icon="close" label="Dismiss" onClick={() => chat.troubles.dismiss(notice.id)} />
    </div>
  );
}
