import type { Attention } from "../../api/inspect";
import type { Look } from "../../state/inspect";
import { byColumn, columns, strengths, strongest } from "../../state/inspect-attention";
import { figure, label, percent } from "./words";

const HEIGHT = 34;

/** The same token seen by every head of the layer, side by side. */
export function HeadBars(props: { answer: Attention; look: Look; onHead: (head: number) => void }) {
  const { answer, look } = props;
  const add = look.measure !== "scores";
  return (
    <div className="ms-heads" role="group" aria-label="Heads">
      {answer.heads.map((head, h) => {
        const row = answer[look.measure][h]?.[0] ?? [];
        const cols = columns(row.length);
        const bars = strengths(byColumn(row, cols, add), add, look.skipFirst, cols);
        const [best] = strongest(row, 1, look.skipFirst);
        return (
          <button
            key={head}
            type="button"
            className="ms-head-card"
            aria-pressed={head === look.head}
            onClick={() => props.onHead(head)}
          >
            <span className="ms-head-name">head {head}</span>
            <svg
              viewBox={`0 0 ${cols.length} ${HEIGHT}`}
              preserveAspectRatio="none"
              aria-hidden="true"
              className="ms-head-bars"
            >
              {bars.map((value, i) => {
                const height = (value ?? 0) * HEIGHT;
                return <rect key={i} x={i + 0.1} width={0.8} y={HEIGHT - height} height={height} />;
              })}
            </svg>
            <span className="ms-head-best">
              {best === undefined ? (
                "only itself"
              ) : (
                <>
                  {label(answer.tokens[best.key] ?? { text: "" }, 10)}{" "}
                  {add ? percent(best.value) : figure(best.value)}
                </>
              )}
            </span>
          </button>
        );
      })}
    </div>
  );
}
