import { useEffect, useRef, useState } from "react";
import { flushSync } from "react-dom";
import type { Session } from "../api/types";
import { useChat, useChatState } from "./context";
import { Icon, IconButton } from "./Icon";
import { applyTheme, keptTheme, type Theme } from "./kept";
import { Menu, type MenuItem } from "./Menu";
import { go, type Place } from "./place";

export function Sidebar(props: {
  place: Place;
  onHelp: () => void;
  onHide: () => void;
  signedIn: boolean;
}) {
  const chat = useChat();
  const all = useChatState((state) => state.sessions);
  const more = useChatState((state) => state.moreSessions);
  const query = useChatState((state) => state.query);
  const deleted = useChatState((state) => state.deleted);
  const sessions = all.filter((session) => !deleted.includes(session.id));
  return (
    <div className="sidebar">
      <div className="sidebar-head">
        <a
          className="wordmark"
          href="/"
          onClick={(event) => {
            event.preventDefault();
            go({ session: null, view: "text" });
          }}
        >
          Headwater
        </a>
        <IconButton icon="close" label="Hide the list" keys="Ctrl+B" onClick={props.onHide} />
      </div>
      <button
        type="button"
        className="button new-button"
        title="New session (Ctrl+Shift+O)"
        onClick={() => go({ session: null, view: "text" })}
      >
        <Icon name="plus" /> New session
      </button>
      <label className="search">
        <Icon name="search" />
        <span className="hidden">Search in sessions</span>
        <input
          id="search"
          type="search"
          placeholder="Search   Ctrl+K"
          value={query}
          onChange={(event) => void chat.sessions.list(event.target.value)}
        />
      </label>
      <nav className="sessions" aria-label="Sessions">
        <ul>
          {sessions.map((session) => (
            <SessionRow
              key={session.id}
              session={session}
              current={session.id === props.place.session}
            />
          ))}
        </ul>
        {sessions.length === 0 && (
          <p className="note">{query === "" ? "No sessions yet." : "Nothing is found."}</p>
        )}
        {more && (
          <button
            type="button"
            className="button button-quiet"
            onClick={() => void chat.sessions.listMore()}
          >
            Earlier ones
          </button>
        )}
      </nav>
      <footer className="sidebar-foot">
        <a
          href="/?view=kv"
          aria-current={props.place.view === "kv" ? "page" : undefined}
          onClick={(event) => {
            event.preventDefault();
            go({ session: null, view: "kv" });
          }}
        >
          With and without the KV cache
        </a>
        <a href="/docs">The API</a>
        {props.signedIn && (
          <button type="button" className="link-button" onClick={() => void chat.signOut()}>
            Sign out
          </button>
        )}
        <div className="sidebar-tools">
          <ThemeSwitch />
          <More onHelp={props.onHelp} />
        </div>
      </footer>
    </div>
  );
}

function SessionRow({ session, current }: { session: Session; current: boolean }) {
  const chat = useChat();
  const [renaming, setRenaming] = useState(false);
  const link = useRef<HTMLAnchorElement>(null);
  const title = session.title ?? "Untitled";
  const remove = () => {
    chat.sessions.remove(session.id);
    if (current) go({ session: null, view: "text" });
  };
  if (renaming) {
    return (
      <li>
        <Rename
          title={title}
          onDone={(name, byKey) => {
            flushSync(() => setRenaming(false));
            if (byKey) link.current?.focus();
            if (name !== null) void chat.sessions.rename(session.id, name);
          }}
        />
      </li>
    );
  }
  return (
    <li className="session" data-current={current}>
      <a
        ref={link}
        href={`/s/${session.id}`}
        aria-current={current ? "page" : undefined}
        onClick={(event) => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault();
          go({ session: session.id, view: "text" });
        }}
        onDoubleClick={() => setRenaming(true)}
      >
        {session.generating !== null && (
          <span className="generating" role="img" aria-label="answering" title="answering" />
        )}
        <span className="session-title">{title}</span>
      </a>
      <Menu
        label={`What to do with “${title}”`}
        items={[
          { label: "Rename", onSelect: () => setTimeout(() => setRenaming(true)) },
          { label: "Delete", danger: true, onSelect: remove },
        ]}
      />
    </li>
  );
}

function Rename(props: { title: string; onDone: (name: string | null, byKey: boolean) => void }) {
  const { title, onDone } = props;
  const input = useRef<HTMLInputElement>(null);
  useEffect(() => input.current?.select(), []);
  return (
    <input
      ref={input}
      className="rename"
      aria-label="Title of the session"
      defaultValue={title}
      maxLength={200}
      onBlur={(event) => onDone(event.target.value, false)}
      onKeyDown={(event) => {
        if (event.key === "Enter") onDone(event.currentTarget.value, true);
        if (event.key === "Escape") {
          event.stopPropagation();
          onDone(null, true);
        }
      }}
    />
  );
}

function ThemeSwitch() {
  const [theme, setTheme] = useState<Theme>(keptTheme);
  return (
    <label className="theme-switch">
      <span className="hidden">Theme</span>
      <select
        value={theme}
        onChange={(event) => {
          const next = event.target.value as Theme;
          setTheme(next);
          applyTheme(next);
        }}
      >
        <option value="system">Theme: system</option>
        <option value="light">Theme: light</option>
        <option value="dark">Theme: dark</option>
      </select>
    </label>
  );
}

function More({ onHelp }: { onHelp: () => void }) {
  const chat = useChat();
  const file = useRef<HTMLInputElement>(null);
  const items: MenuItem[] = [
    { label: "Import a session …", onSelect: () => file.current?.click() },
    { label: "Keys of this page", onSelect: onHelp },
  ];
  return (
    <>
      <Menu label="More" items={items} />
      <input
        ref={file}
        type="file"
        accept="application/json,.json"
        hidden
        aria-label="A session that was exported"
        onChange={(event) => {
          const chosen = event.target.files?.[0];
          event.target.value = "";
          if (chosen === undefined) return;
          void chosen
            .text()
            .then((text) => chat.sessions.importTranscript(text))
            .then((id) => id !== null && go({ session: id, view: "text" }));
        }}
      />
    </>
  );
}
