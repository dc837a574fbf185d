import * as Dropdown from "@radix-ui/react-dropdown-menu";
import { Icon } from "./Icon";

export type MenuItem = { label: string; onSelect: () => void; danger?: boolean } | "rule";

/** A button with a menu. Not modal: a modal one locks scrolling with a style element, which the
 * content security policy forbids. */
export function Menu({ label, items }: { label: string; items: MenuItem[] }) {
  return (
    <Dropdown.Root modal={false}>
      <Dropdown.Trigger className="icon-button" aria-label={label} title={label}>
        <Icon name="more" />
      </Dropdown.Trigger>
      <Dropdown.Portal>
        <Dropdown.Content className="menu" align="end" sideOffset={4} collisionPadding={8}>
          {items.map((item, i) =>
            item === "rule" ? (
              <Dropdown.Separator key={i} className="menu-rule" />
            ) : (
              <Dropdown.Item
                key={item.label}
                className={item.danger ? "menu-item menu-danger" : "menu-item"}
                onSelect={item.onSelect}
              >
                {item.label}
              </Dropdown.Item>
            ),
          )}
        </Dropdown.Content>
      </Dropdown.Portal>
    </Dropdown.Root>
  );
}
