/** Attention as it is drawn: which keys get a column, and how strong each is. Pure. */

import type { Span } from "./inspect";

/** Keys that are drawn as one: a single token, or all between the first and those that are near. */
export type Column = Span;

export const MAX_COLUMNS = 34;

/** The columns of `length` keys: all of them, or where they are too many the first, the next ones
 * together, and the last. */
export function columns(length: number): Column[] {
  const one = (from: number): Column => ({ from, to: from + 1 });
  if (length <= MAX_COLUMNS) return Array.from({ length }, (_, i) => one(i));
  const near = length - (MAX_COLUMNS - 2);
  return [
    one(0),
    { from: 1, to: near },
    ...Array.from({ length: length - near }, (_, i) => one(near + i)),
  ];
}

/** The values of one query's row by column. Weights and shares add up, of scores the largest
 * counts. Null where the row has no such key: a token sees only what is before it. */
export function byColumn(
  row: readonly number[],
  cols: readonly Column[],
  add: boolean,
): (number | null)[] {
  return cols.map(({ from, to }) => {
    const values = row.slice(from, to);
    if (values.length === 0) return null;
    return add ? values.reduce((sum, value) => sum + value, 0) : Math.max(...values);
  });
}

/** How strongly each value is drawn, 0..1: from nothing (for scores, the smallest) to the largest
 * of a single token. */
export function strengths(
  values: readonly (number | null)[],
  add: boolean,
  skipFirst: boolean,
  cols: readonly Column[] = [],
): (number | null)[] {
  const many = cols.findIndex(({ from, to }) => to - from > 1);
  const counted = values.filter(
    (value, i) => value !== null && i !== many && !(skipFirst && i === 0),
  ) as number[];
  const top = Math.max(...counted);
  const bottom = add ? 0 : Math.min(...counted);
  return values.map((value, i) => {
    if (value === null || (skipFirst && i === 0)) return null;
    if (!(top > bottom)) return top > 0 ? 1 : 0;
    return Math.min(1, Math.max(0, (value - bottom) / (top - bottom)));
  });
}

/** The keys with the largest values, largest first. */
export function strongest(
  row: readonly number[],
  count: number,
  skipFirst: boolean,
): { key: number; value: number }[] {
  return row
    .map((value, key) => ({ key, value }))
    .slice(skipFirst ? 1 : 0)
    .sort((a, b) => b.value - a.value)
    .slice(0, count);
}

const ROWS = 32;
const STEP = 8;

/** The queries of the map: some rows up to a little after the selected token. */
export function queriesAround(length: number, selected: number): number[] {
  const end = Math.min(length, (Math.floor(selected / STEP) + 1) * STEP);
  const begin = Math.max(0, end - ROWS);
  return Array.from({ length: end - begin }, (_, i) => begin + i);
}
