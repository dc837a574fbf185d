import { lazy, Suspense, useEffect, useMemo, useState, useSyncExternalStore } from "react";
import { flushSync } from "react-dom";
import { Chat } from "../state/chat";
import { pathTo } from "../state/tree";
import { NEW } from "../state/words";
import { Announcer } from "./Announcer";
import { AsCode } from "./AsCode";
import { Composer } from "./Composer";
import { ChatContext, useChat, useChatState } from "./context";
import { FirstScreen } from "./FirstScreen";
import { Help } from "./Help";
import { IconButton } from "./Icon";
import { forget, keepSignedIn, keepWords, keptDraft, keptSignedIn, watchWords } from "./kept";
import { isComposing } from "./keys";
import { Notices } from "./Notices";
import { Parameters } from "./Parameters";
import { go, placeOf, usePlace, type Place } from "./place";
import { SessionHead } from "./SessionHead";
import { Sidebar } from "./Sidebar";
import { SignIn } from "./SignIn";
import { Transcript } from "./turns/Transcript";

const Microscope = lazy(() => import("./microscope").then((m) => ({ default: m.Microscope })));
const CacheView = lazy(() => import("./microscope").then((m) => ({ default: m.CacheView })));
const KvComparison = lazy(() => import("./microscope").then((m) => ({ default: m.KvComparison })));

/** How often the list is asked for anew while something in it is answering. */
const LIST_MS = 4000;
/** Below this width the list lies over the page and is hidden at first. */
const NARROW = "(max-width: 52rem)";

export function App() {
  const chat = useMemo(() => new Chat(keptDraft(), forget), []);
  useEffect(() => {
    void chat.enter();
    const leave = () => chat.sessions.leavePage();
    addEventListener("pagehide", leave);
    const keepNoMore = keepWords(chat.store);
    const watchNoMore = watchWords((of, text) => {
      // Two windows may write in the same session; each has its own field then.
      const shown = placeOf(location).session ?? NEW;
      if (of !== shown && chat.store.get().words[of] !== undefined)
        chat.store.dispatch({ type: "words", of, text });
    });
    return () => {
      removeEventListener("pagehide", leave);
      keepNoMore();
      watchNoMore();
    };
  }, [chat]);
  return (
    <ChatContext value={chat}>
      <Door />
      <Notices />
    </ChatContext>
  );
}

function Door() {
  const chat = useChat();
  const door = useChatState((state) => state.door);
  const [keyed, setKeyed] = useState(keptSignedIn);
  useEffect(() => {
    // Asked for a key once, this server wants one.
    if (door === "out") {
      setKeyed(true);
      keepSignedIn(false);
    } else if (door === "in" && keyed) keepSignedIn(true);
    if (door !== "unreachable") return undefined;
    const timer = setInterval(() => void chat.enter(), 2000);
    return () => clearInterval(timer);
  }, [chat, door, keyed]);
  switch (door) {
    case "unknown":
      return <main aria-busy="true" aria-label="Headwater" />;
    case "unreachable":
      return (
        <main className="sign-in">
          <h1 className="wordmark">Headwater</h1>
          <p role="alert">The server cannot be reached. The page tries again by itself.</p>
        </main>
      );
    case "out":
      return <SignIn />;
    case "in":
      return <Page keyed={keyed} />;
  }
}

type Shown = "parameters" | "code" | "help" | null;

function Page({ keyed }: { keyed: boolean }) {
  const chat = useChat();
  const place = usePlace();
  const opened = useChatState((state) => state.open?.session.id ?? null);
  const narrow = useNarrow();
  const [sidebar, setSidebar] = useState(!narrow);
  const [dialog, setDialog] = useState<Shown>(null);
  const [editing, setEditing] = useState<string | null>(null);
  const asked = useChatState((state) => state.pending !== null);

  useSession(place, opened);
  useFreshList();
  useEffect(() => setEditing(null), [place.session]);
  useEffect(() => {
    if (matchMedia(NARROW).matches) setSidebar(false);
  }, [place]);
  const overlaid = narrow && sidebar;
  useEffect(() => setSidebar(!narrow), [narrow]);
  useEffect(() => {
    if (overlaid) document.querySelector<HTMLElement>(".sidebar button")?.focus();
  }, [overlaid]);

  const editLast = () => {
    const open = chat.store.get().open;
    const path = open === null ? [] : pathTo(open.turns, open.session.head);
    const last = path.filter((turn) => turn.role === "user").at(-1);
    if (last !== undefined) setEditing(last.id);
  };

  useEffect(() => {
    // Focus moves before the handler returns: the next key may be struck already.
    const onKey = (event: KeyboardEvent) => {
      if (isComposing(event) || document.querySelector("dialog[open]") !== null) return;
      const control = event.ctrlKey || event.metaKey;
      const key = event.key.toLowerCase();
      if (control && key === "k") {
        event.preventDefault();
        flushSync(() => setSidebar(true));
        document.getElementById("search")?.focus();
      } else if (control && event.shiftKey && key === "o") {
        event.preventDefault();
        flushSync(() => go({ session: null, view: "text" }));
        document.getElementById("composer")?.focus();
      } else if (control && !event.shiftKey && key === "b") {
        event.preventDefault();
        setSidebar((shown) => !shown);
      } else if (event.key === "Escape" && !event.defaultPrevented) {
        const { live, pending } = chat.store.get();
        if (overlaid) setSidebar(false);
        else if (live !== null || pending !== null) void chat.stop();
        else if (document.activeElement?.id === "search") {
          document.getElementById("composer")?.focus();
        }
      }
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [chat, overlaid]);

  const loaded = place.session === opened; // a dialog that is asked for before comes then
  const target = place.view === "text" ? "composer" : "main";
  return (
    <div className="page" data-sidebar={sidebar}>
      <a
        className="skip"
        href={`#${target}`}
        onClick={(event) => {
          event.preventDefault();
          document.getElementById(target)?.focus();
        }}
      >
        {target === "composer" ? "To the field" : "To the content"}
      </a>
      {sidebar && (
        <Sidebar
          place={place}
          signedIn={keyed}
          onHelp={() => setDialog("help")}
          onHide={() => setSidebar(false)}
        />
      )}
      {sidebar && (
        <div className="sidebar-veil" aria-hidden="true" onClick={() => setSidebar(false)} />
      )}
      <main id="main" className="main" tabIndex={-1} inert={overlaid}>
        <header className="main-head">
          {!sidebar && (
            <IconButton
              icon="menu"
              label="Show the list"
              keys="Ctrl+B"
              onClick={() => setSidebar(true)}
            />
          )}
          <SessionHead place={place} onDialog={setDialog} />
        </header>
        <Suspense fallback={<p className="note instrument">Fetching the instruments …</p>}>
          <View place={place} asked={asked} opened={opened} editing={editing} onEdit={setEditing} />
        </Suspense>
        {place.view === "text" && (
          <Composer key={place.session ?? "new"} session={place.session} onEditLast={editLast} />
        )}
      </main>
      <Announcer />
      {dialog === "parameters" && loaded && <Parameters onClose={() => setDialog(null)} />}
      {dialog === "code" && loaded && <AsCode keyed={keyed} onClose={() => setDialog(null)} />}
      {dialog === "help" && <Help onClose={() => setDialog(null)} />}
    </div>
  );
}

function View(props: {
  place: Place;
  asked: boolean;
  opened: string | null;
  editing: string | null;
  onEdit: (turn: string | null) => void;
}) {
  const { place, opened } = props;
  const opening = useChatState((state) => state.opening !== null);
  const { session, view } = place;
  const back = () => go({ session, view: "text" });
  if (view === "kv") {
    return (
      <div className="instrument">
        <KvComparison />
      </div>
    );
  }
  if (opening) return <div className="transcript-frame" aria-busy="true" />;
  if (session !== null && view === "cache") {
    return (
      <div className="instrument">
        <CacheView sessionId={session} />
      </div>
    );
  }
  if (session !== null && typeof view === "object") {
    return (
      <div className="instrument">
        <Microscope
          key={view.turn}
          sessionId={session}
          turnId={view.turn}
          onForked={(id) => go({ session: id, view: "text" })}
          onClose={back}
        />
      </div>
    );
  }
  if (opened === null && !props.asked) return <FirstScreen />;
  return <Transcript key={opened ?? "new"} editing={props.editing} onEdit={props.onEdit} />;
}

function useNarrow(): boolean {
  return useSyncExternalStore(
    (listener) => {
      const query = matchMedia(NARROW);
      query.addEventListener("change", listener);
      return () => query.removeEventListener("change", listener);
    },
    () => matchMedia(NARROW).matches,
  );
}

/** The address and the open session follow each other. */
function useSession(place: Place, opened: string | null): void {
  const chat = useChat();
  useEffect(() => {
    const { open, opening, pending } = chat.store.get();
    if (place.session === (opening ?? open?.session.id ?? null)) return;
    const wanted = place.session;
    if (wanted !== null) {
      void chat.open(wanted).then((there) => {
        if (!there && placeOf(location).session === wanted)
          go({ session: null, view: "text" }, true);
      });
    } else if (pending === null || open !== null) chat.close();
  }, [chat, place.session]);
  useEffect(() => {
    // A session that began with the first words has an address from now on.
    if (opened !== null && place.session === null && chat.store.get().pending !== null) {
      go({ session: opened, view: "text" }, true);
    }
  }, [chat, opened, place.session]);
}

/** The list says which sessions are answering, also those that others began. */
function useFreshList(): void {
  const chat = useChat();
  const busy = useChatState((state) =>
    state.sessions.some((session) => session.generating !== null),
  );
  useEffect(() => {
    const fresh = () => {
      if (document.visibilityState === "visible") void chat.sessions.list(chat.store.get().query);
    };
    document.addEventListener("visibilitychange", fresh);
    const timer = busy ? setInterval(fresh, LIST_MS) : undefined;
    return () => {
      document.removeEventListener("visibilitychange", fresh);
      clearInterval(timer);
    };
  }, [chat, busy]);
}
