import { useId, type KeyboardEvent, type ReactNode } from "react";

/** Tabs after https://www.w3.org/WAI/ARIA/apg/patterns/tabs/; arrows choose at once. */
export function Tabs<Name extends string>(props: {
  label: string;
  tabs: readonly { name: Name; title: string }[];
  chosen: Name;
  onChoose: (name: Name) => void;
  children: ReactNode;
}) {
  const id = useId();
  const at = props.tabs.findIndex((tab) => tab.name === props.chosen);

  function move(event: KeyboardEvent<HTMLDivElement>) {
    const count = props.tabs.length;
    const to = {
      ArrowRight: (at + 1) % count,
      ArrowLeft: (at + count - 1) % count,
      Home: 0,
      End: count - 1,
    }[event.key];
    const tab = to === undefined ? undefined : props.tabs[to];
    if (tab === undefined) return;
    event.preventDefault();
    props.onChoose(tab.name);
    document.getElementById(`${id}-${tab.name}`)?.focus();
  }

  return (
    <div className="ms-tabs">
      <div className="ms-tablist" role="tablist" aria-label={props.label} onKeyDown={move}>
        {props.tabs.map((tab) => (
          <button
            key={tab.name}
            id={`${id}-${tab.name}`}
            type="button"
            role="tab"
            className="ms-tab"
            aria-selected={tab.name === props.chosen}
            aria-controls={`${id}-panel`}
            tabIndex={tab.name === props.chosen ? 0 : -1}
            onClick={() => props.onChoose(tab.name)}
          >
            {tab.title}
          </button>
        ))}
      </div>
      <div
        id={`${id}-panel`}
        className="ms-panel"
        role="tabpanel"
        aria-labelledby={`${id}-${props.chosen}`}
      >
        {props.children}
      </div>
    </div>
  );
}
