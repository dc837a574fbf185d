import { Dialog } from "./Dialog";

const KEYS = [
  ["Enter", "send"],
  ["Shift+Enter", "a new line"],
  ["Esc", "stop the answer; close what is open"],
  ["↑ in an empty field", "edit what you said last"],
  ["Ctrl+K", "search in sessions"],
  ["Ctrl+Shift+O", "new session"],
  ["Ctrl+B", "show or hide the list"],
  ["Home, End", "the first turn, the last one"],
] as const;

export function Help({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="Keys of this page" onClose={onClose}>
      <table className="keys">
        <tbody>
          {KEYS.map(([keys, what]) => (
            <tr key={keys}>
              <th scope="row">
                <kbd>{keys}</kbd>
              </th>
              <td>{what}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Dialog>
  );
}
