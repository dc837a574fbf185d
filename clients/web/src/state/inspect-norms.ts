/** A logarithmic axis. Pure. */

/** Powers of ten from the one below the smallest positive value to the one above the largest. */
export function ticks(values: readonly number[]): number[] {
  const positive = values.filter((value) => value > 0);
  if (positive.length === 0) return [1, 10];
  const first = Math.floor(Math.log10(Math.min(...positive)));
  const last = Math.max(first + 1, Math.ceil(Math.log10(Math.max(...positive))));
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i)).map((tick) =>
    Number(tick.toPrecision(1)),
  );
}

/** Where a value lies between the first tick (0) and the last (1). */
export function toUnit(value: number, marks: readonly number[]): number {
  const [first, last] = [marks[0] ?? 1, marks[marks.length - 1] ?? 10];
  if (value <= first) return 0;
  return Math.min(1, Math.log10(value / first) / Math.log10(last / first));
}
