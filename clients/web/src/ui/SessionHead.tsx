import { useEffect } from "react";
import { exportPath } from "../api/routes";
import { useChat, useChatState } from "./context";
import { IconButton } from "./Icon";
import { Menu } from "./Menu";
import { go, type Place } from "./place";

/** The title, the two ways to look at the session, and what can be done with it. */
export function SessionHead(props: {
  place: Place;
  onDialog: (dialog: "parameters" | "code") => void;
}) {
  const chat = useChat();
  const session = useChatState((state) => state.open?.session ?? null);
  const { view } = props.place;
  const title = view === "kv" ? "With and without the KV cache" : (session?.title ?? "");
  useEffect(() => {
    document.title = title === "" ? "Headwater" : `${title} · Headwater`;
  }, [title]);
  const settings = (
    <IconButton
      icon="sliders"
      label="System prompt and parameters"
      onClick={() => props.onDialog("parameters")}
    />
  );
  if (session === null || view === "kv") {
    return (
      <>
        <h1 className="session-name">{title || <span className="hidden">New session</span>}</h1>
        {view !== "kv" && settings}
      </>
    );
  }
  const tab = typeof view === "object" ? "tokens" : view;
  return (
    <>
      <h1 className="session-name" title={title}>
        {title || "Untitled"}
      </h1>
      <nav className="tabs" aria-label="Views of this session">
        <Tab name="Text" current={tab === "text"} to={{ session: session.id, view: "text" }} />
        <Tab name="Cache" current={tab === "cache"} to={{ session: session.id, view: "cache" }} />
      </nav>
      {settings}
      <Menu
        label="What to do with this session"
        items={[
          { label: "As curl or Python", onSelect: () => props.onDialog("code") },
          { label: "Export as Markdown", onSelect: () => download(session.id, "markdown") },
          { label: "Export as JSON", onSelect: () => download(session.id, "json") },
          "rule",
          {
            label: "Delete",
            danger: true,
            onSelect: () => {
              chat.sessions.remove(session.id);
              go({ session: null, view: "text" });
            },
          },
        ]}
      />
    </>
  );
}

function Tab({ name, current, to }: { name: string; current: boolean; to: Place }) {
  return (
    <button
      type="button"
      className="tab"
      aria-current={current ? "page" : undefined}
      onClick={() => go(to)}
    >
      {name}
    </button>
  );
}

function download(session: string, format: "json" | "markdown"): void {
  const link = document.createElement("a");
  link.href = exportPath(session, format);
  link.download = `${session}.${format === "json" ? "json" : "md"}`;
  link.click();
}
