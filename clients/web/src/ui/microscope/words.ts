/** Numbers and tokens as the instruments write them. */

export function percent(share: number): string {
  const value = share * 100;
  if (value >= 99.95) return "100%";
  if (value >= 10) return `${value.toFixed(0)}%`;
  if (value >= 0.1) return `${value.toFixed(1)}%`;
  return value >= 0.01 ? `${value.toFixed(2)}%` : "<0.01%";
}

export const whole = (count: number): string => count.toLocaleString("en-US");

export function figure(value: number): string {
  const size = Math.abs(value);
  if (size >= 1000) return whole(Math.round(value));
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

const shape = (piece: { text: string; bytes?: number[] }): string =>
  piece.text.includes("\ufffd") && piece.bytes !== undefined
    ? `⟨${piece.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩`
    : piece.text;

/** A token in running text: line breaks are seen and still break, half characters are bytes. */
export const running = (piece: { text: string; bytes?: number[] }): string =>
  shape(piece).replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");

/** A token in a table or on an axis: short, on one line, its leading space seen. */
export function label(piece: { text: string; bytes?: number[] }, length = 16): string {
  const text = shape(piece).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
  const characters = Array.from(text);
  if (characters.length === 0) return "∅";
  return characters.length <= length ? text : `${characters.slice(0, length - 1).join("")}…`;
}

/** How probable, as a colour between the three of the theme. */
export function probabilityColour(prob: number): string {
  const [low, high, share] =
    prob < 0.5
      ? ["--prob-low", "--prob-mid", prob * 2]
      : ["--prob-mid", "--prob-high", prob * 2 - 1];
  return `color-mix(in oklab, var(${high}) ${Math.round(Number(share) * 100)}%, var(${low}))`;
}

/** The accent as thin as the value is small. Text on it keeps its contrast. */
export const wash = (strength: number): string =>
  `color-mix(in oklab, var(--ms-wash) ${Math.round(strength * 100)}%, transparent)`;
