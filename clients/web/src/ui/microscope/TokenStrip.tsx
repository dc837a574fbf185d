import { memo, useEffect, useId, useRef, type KeyboardEvent, type MouseEvent } from "react";

import type { SeenToken } from "../../state/inspect";
import { percent, probabilityColour, running } from "./words";

/** So much of the lines around the chosen token stays to be seen, in pixels. */
const MARGIN = 48;

/** The text as its tokens, each with its probability as a colour. One stop of the Tab key; arrows
 * go from token to token. */
export function TokenStrip(props: {
  tokens: readonly SeenToken[];
  selected: number;
  onSelect: (index: number) => void;
}) {
  const id = useId();
  const box = useRef<HTMLDivElement>(null);
  const { tokens, selected, onSelect } = props;
  const first = tokens[0]?.index ?? 0;
  const last = first + tokens.length - 1;

  useEffect(() => {
    const token = document.getElementById(`${id}-${selected}`);
    const view = box.current;
    if (token === null || view === null) return;
    // Only the strip scrolls: scrollIntoView would move the page under the reader.
    const top = token.offsetTop - MARGIN;
    const bottom = token.offsetTop + token.offsetHeight + MARGIN;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (bottom > view.scrollTop + view.clientHeight)
      view.scrollTop = bottom - view.clientHeight;
  }, [id, selected]);

  function move(event: KeyboardEvent) {
    const to = {
      ArrowRight: selected + 1,
      ArrowLeft: selected - 1,
      ArrowDown: selected + 10,
      ArrowUp: selected - 10,
      Home: first,
      End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    onSelect(Math.min(last, Math.max(first, to)));
  }

  function click(event: MouseEvent) {
    const token = (event.target as Element).closest<HTMLElement>("[data-index]");
    if (token !== null) onSelect(Number(token.dataset["index"]));
  }

  return (
    <div
      ref={box}
      className="ms-strip"
      role="listbox"
      aria-label="Tokens"
      aria-activedescendant={`${id}-${selected}`}
      tabIndex={0}
      onKeyDown={move}
      onClick={click}
    >
      {tokens.map((token) => (
        <Token key={token.index} id={id} token={token} selected={token.index === selected} />
      ))}
    </div>
  );
}

const Token = memo(function Token(props: { id: string; token: SeenToken; selected: boolean }) {
  const { token } = props;
  const { drawn } = token;
  const colour = drawn === null ? "transparent" : probabilityColour(drawn.prob);
  const kind = token.special ? " ms-special" : "";
  return (
    <span
      id={`${props.id}-${token.index}`}
      className={`ms-token${token.answer ? "" : " ms-given"}${kind}`}
      role="option"
      aria-selected={props.selected}
      data-index={token.index}
      title={drawn === null ? undefined : `${percent(drawn.prob)}, rank ${drawn.rank}`}
      style={{ ["--ms-colour" as string]: colour }}
    >
      {running(token)}
    </span>
  );
});
