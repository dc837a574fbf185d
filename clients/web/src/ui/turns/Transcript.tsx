import { useVirtualizer } from "@tanstack/react-virtual";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef } from "react";
import type { Turn } from "../../api/types";
import { liveTurn } from "../../state/reducer";
import { childrenOf, pathTo, textOf } from "../../state/tree";
import { useChat, useChatState } from "../context";
import { IconButton } from "../Icon";
import { go } from "../place";
import { AnswerTurn, LiveTurn, SendingTurn } from "./AnswerTurn";
import { PendingTrouble } from "./PendingTrouble";
import { SaidTurn, UserTurn } from "./UserTurn";

type Row =
  | { kind: "turn"; turn: Turn }
  | { kind: "said"; text: string }
  | { kind: "live" }
  | { kind: "sending" }
  | { kind: "trouble" };

/** How near to the end, in pixels, counts as being there: the page then follows what is written. */
const NEAR = 80;
const NO_SIBLINGS: readonly string[] = [];

interface Props {
  editing: string | null;
  onEdit: (turn: string | null) => void;
}

/** The path to the session's head, as a list of which only what is near is drawn. */
export function Transcript({ editing, onEdit }: Props) {
  const chat = useChat();
  const open = useChatState((state) => state.open);
  const pending = useChatState((state) => state.pending);
  const generation = useChatState((state) => state.live?.generation ?? null);
  const liveId = useChatState((state) =>
    state.live === null || state.open === null
      ? null
      : (liveTurn(state.open.turns, state.live)?.id ?? null),
  );
  const scroller = useRef<HTMLDivElement>(null);

  const children = useMemo(() => childrenOf(open?.turns ?? {}), [open?.turns]);
  const rows = useMemo(() => {
    const busy = pending?.error?.code === "session_busy";
    // What could not be sent stands after the other window's answer.
    const end = pending === null || busy ? open?.session.head : pending.parent;
    const shown = open === null ? [] : pathTo(open.turns, end ?? null);
    const rows: Row[] = shown
      .filter((turn) => turn.id !== liveId)
      .map((turn) => ({ kind: "turn", turn }));
    const said: Row[] = pending?.text == null ? [] : [{ kind: "said", text: pending.text }];
    const answer: Row[] = generation === null ? [] : [{ kind: "live" }];
    rows.push(...(busy ? [...answer, ...said] : [...said, ...answer]));
    if (busy) rows.push({ kind: "trouble" });
    else if (generation === null && pending !== null)
      rows.push({ kind: pending.error === null ? "sending" : "trouble" });
    return rows;
  }, [open, pending, generation, liveId]);

  const virtual = useVirtualizer({
    count: rows.length,
    getScrollElement: () => scroller.current,
    estimateSize: (index) => estimate(rows[index]),
    // The live answer keeps its place when it becomes a turn: rows are known by their number.
    getItemKey: (index) => `${open?.session.id ?? ""}${index}`,
    overscan: 4,
    paddingStart: 24,
    paddingEnd: 24,
    anchorTo: "end",
    followOnAppend: true,
    scrollEndThreshold: NEAR,
  });

  const session = open?.session.id ?? null;
  useLayoutEffect(() => {
    if (session !== null) virtual.scrollToEnd();
    // Only when another session is shown; the virtualizer is the same one.
  }, [session, virtual]);
  const said = pending?.key ?? null;
  useEffect(() => {
    if (said !== null) virtual.scrollToEnd();
  }, [said, virtual]);

  const edited = rows.findIndex((row) => row.kind === "turn" && row.turn.id === editing);
  useEffect(() => {
    if (edited >= 0) virtual.scrollToIndex(edited, { align: "auto" });
  }, [edited, virtual]);

  const fork = useCallback(
    (turn: string) =>
      void chat.fork(turn).then((id) => {
        if (id !== null) go({ session: id, view: "text" });
      }),
    [chat],
  );

  const draw = (row: Row, index: number) => {
    switch (row.kind) {
      case "said":
        return <SaidTurn text={row.text} />;
      case "live":
        return <LiveTurn />;
      case "sending":
        return <SendingTurn />;
      case "trouble":
        return pending?.error == null ? null : (
          <PendingTrouble trouble={pending.error} words={pending.text !== null} />
        );
      case "turn": {
        const { turn } = row;
        const siblings = children.get(turn.parent ?? "") ?? NO_SIBLINGS;
        return turn.role === "assistant" ? (
          <AnswerTurn
            turn={turn}
            siblings={siblings}
            atHead={index === rows.length - 1}
            onFork={fork}
          />
        ) : (
          <UserTurn
            turn={turn}
            siblings={siblings}
            editing={editing === turn.id}
            onEdit={onEdit}
            onFork={fork}
          />
        );
      }
    }
  };

  const away = scroller.current !== null && !virtual.isAtEnd(4 * NEAR);
  return (
    <div className="transcript-frame">
      <div
        ref={scroller}
        className="transcript"
        role="log"
        aria-label="Conversation"
        aria-live="off"
        tabIndex={0}
        onKeyDown={(event) => {
          if (event.target !== event.currentTarget) return;
          if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
          // The browser's own jump is lost while rows that were just drawn are being measured.
          if (event.key === "Home") virtual.scrollToIndex(0, { align: "start" });
          else if (event.key === "End") virtual.scrollToEnd();
          else return;
          event.preventDefault();
        }}
      >
        <div className="rows" style={{ height: virtual.getTotalSize() }}>
          {virtual.getVirtualItems().map((item) => {
            const row = rows[item.index];
            return (
              row && (
                <div
                  key={item.key}
                  ref={virtual.measureElement}
                  data-index={item.index}
                  className="row"
                  style={{ transform: `translateY(${item.start}px)` }}
                >
                  {draw(row, item.index)}
                </div>
              )
            );
          })}
        </div>
      </div>
      {away && (
        <div className="to-end">
          <IconButton icon="down" label="To the end" onClick={() => virtual.scrollToEnd()} />
        </div>
      )}
    </div>
  );
}

/** A first guess at a row's height in pixels, by its text. */
function estimate(row: Row | undefined): number {
  if (row === undefined || row.kind !== "turn") return 120;
  return 90 + 30 * Math.ceil(textOf(row.turn).length / 70);
}
