/** Small line drawings; what they mean is said by the control that they are on. */

const PATHS = {
  menu: "M3 5h14M3 10h14M3 15h14",
  plus: "M10 4v12M4 10h12",
  search: "M8.5 14a5.5 5.5 0 1 0 0-11 5.5 5.5 0 0 0 0 11zM13 13l4 4",
  more: "M4.5 10h1M9.5 10h1M14.5 10h1",
  copy: "M7 7h9v9H7zM13 7V4H4v9h3",
  check: "M4 10.5l4 4 8-9",
  edit: "M4 16l.8-3.5L13 4.3l2.7 2.7-8.2 8.200zM11.5 5.8l2.7 2.7",
  again: "M15.5 7A6 6 0 1 0 16 11M16 3.5V7.5h-4",
  fork: "M6 4v12M6 11c6 0 8-2 8-7M11.5 6L14 3.5 16.5 6",
  forward: "M5 5l6 5-6 5zM14 5v10",
  lens: "M8.5 14a5.5 5.5 0 1 0 0-11 5.5 5.5 0 0 0 0 11zM13 13l4 4M6 8.5h5M8.5 6v5",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  stop: "M6 6h8v8H6z",
  send: "M10 16V4M5 9l5-5 5 5",
  close: "M5 5l10 10M15 5L5 15",
  down: "M10 4v12M5 11l5 5 5-5",
  sliders: "M3 6h7M14 6h3M12 4v4M3 14h2M9 14h8M7 12v4",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg className="icon" viewBox="0 0 20 20" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

/** A button that shows only a drawing; `label` is its name. */
export function IconButton(props: {
  icon: IconName;
  label: string;
  onClick?: () => void;
  disabled?: boolean;
  pressed?: boolean;
  keys?: string;
}) {
  const title = props.keys === undefined ? props.label : `${props.label} (${props.keys})`;
  return (
    <button
      type="button"
      className="icon-button"
      aria-label={props.label}
      aria-pressed={props.pressed}
      title={title}
      disabled={props.disabled}
      onClick={props.onClick}
    >
      <Icon name={props.icon} />
    </button>
  );
}
