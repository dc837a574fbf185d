import { memo, useState } from "react";

import type { Attention } from "../../api/inspect";
import type { Look } from "../../state/inspect";
import { byColumn, columns, strengths, type Column } from "../../state/inspect-attention";
import { figure, label, percent, wash } from "./words";

const CELL = 15;
const LEFT = 92;
const TOP = 74;

/** One head as a map: a row for each token that looks, a column for each token looked at. The
 * strongest of each row are in the table of the text above, so it is a picture to readers of it. */
export function AttentionGrid(props: {
  answer: Attention;
  look: Look;
  selected: number;
  onSelect: (key: number) => void;
}) {
  const { answer, look } = props;
  const [cell, setCell] = useState<{ row: number; col: number } | null>(null);
  const last = answer.queries[answer.queries.length - 1] ?? 0;
  const cols = columns(last + 1);
  const add = look.measure !== "scores";
  const values = (answer[look.measure][0] ?? []).map((row) => byColumn(row, cols, add));

  return (
    <figure className="ms-figure">
      <div className="ms-scroll" tabIndex={0} role="group" aria-label="Attention map, scrollable">
        <svg
          className="ms-map"
          width={LEFT + cols.length * CELL + 28}
          height={TOP + values.length * CELL + 4}
          role="img"
          aria-label={`Attention of head ${look.head} in layer ${look.layer}`}
          onPointerLeave={() => setCell(null)}
          onPointerMove={(event) => {
            const at = event.target as SVGElement;
            const [row, col] = [at.dataset["row"], at.dataset["col"]];
            setCell(
              row === undefined || col === undefined
                ? null
                : { row: Number(row), col: Number(col) },
            );
          }}
          onClick={(event) => {
            const row = (event.target as SVGElement).dataset["row"];
            const query = row === undefined ? undefined : answer.queries[Number(row)];
            if (query !== undefined) props.onSelect(query);
          }}
        >
          <Cells
            answer={answer}
            cols={cols}
            values={values}
            add={add}
            skipFirst={look.skipFirst}
            selected={props.selected}
          />
        </svg>
      </div>
      <figcaption className="ms-note">
        {cell === null ? (
          "Rows look, columns are looked at. Point at a cell to read it, click to choose its row."
        ) : (
          <Reading answer={answer} cols={cols} values={values} cell={cell} add={add} />
        )}
      </figcaption>
    </figure>
  );
}

function name(answer: Attention, column: Column): string {
  if (column.to - column.from > 1) return `${column.to - column.from} others`;
  return label(answer.tokens[column.from] ?? { text: "" }, 10);
}

function Reading(props: {
  answer: Attention;
  cols: Column[];
  values: (number | null)[][];
  cell: { row: number; col: number };
  add: boolean;
}) {
  const { answer, cols, values, cell, add } = props;
  const value = values[cell.row]?.[cell.col] ?? null;
  const query = answer.queries[cell.row];
  const column = cols[cell.col];
  if (value === null || query === undefined || column === undefined) return "Later: not seen.";
  return (
    <>
      <b>{label(answer.tokens[query] ?? { text: "" })}</b> looks at <b>{name(answer, column)}</b>:{" "}
      {add ? percent(value) : figure(value)}
    </>
  );
}

const Cells = memo(function Cells(props: {
  answer: Attention;
  cols: Column[];
  values: (number | null)[][];
  add: boolean;
  skipFirst: boolean;
  selected: number;
}) {
  const { answer, cols } = props;
  return (
    <>
      {cols.map((column, i) => (
        <text
          key={i}
          className="ms-axis"
          transform={`translate(${LEFT + i * CELL + CELL * 0.7} ${TOP - 5}) rotate(-60)`}
        >
          {name(answer, column)}
        </text>
      ))}
      {props.values.map((row, r) => {
        const query = answer.queries[r] ?? 0;
        const shades = strengths(row, props.add, props.skipFirst, cols);
        return (
          <g key={query}>
            <text
              className={query === props.selected ? "ms-axis ms-axis-own" : "ms-axis"}
              x={LEFT - 6}
              y={TOP + r * CELL + CELL - 4}
              textAnchor="end"
              data-row={r}
            >
              {label(answer.tokens[query] ?? { text: "" }, 10)}
            </text>
            {row.map((value, c) =>
              value === null ? null : (
                <rect
                  key={c}
                  className="ms-cell"
                  x={LEFT + c * CELL}
                  y={TOP + r * CELL}
                  width={CELL - 1}
                  height={CELL - 1}
                  style={{ fill: shades[c] === null ? "none" : wash(shades[c] ?? 0) }}
                  data-row={r}
                  data-col={c}
                />
              ),
            )}
            {query === props.selected && (
              <rect
                className="ms-row-mark"
                x={LEFT - 1}
                y={TOP + r * CELL - 1}
                width={row.filter((value) => value !== null).length * CELL + 1}
                height={CELL + 1}
              />
            )}
          </g>
        );
      })}
    </>
  );
});
