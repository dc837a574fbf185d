/** Markdown in pieces that do not change once the next one has begun, so that a growing answer
 * costs what is new and not what is there.
 *
 * The price: a reference whose definition stands in another piece is shown as it was written. */

const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const LIST_ITEM = /^ {0,3}(?:[-*+]|\d{1,9}[.)])(?: |$)/;
/** A line that is still being written and may become a list item. */
const MAY_BE_ITEM = /^ {0,3}\d{1,9}[.)]?$/;

const DEFINITION = /^( {0,3})\[(?=[^\]\n]+\]:)/;

/** A piece of definitions (of notes, of addresses) as text, since what refers to them is in another
 * piece: as Markdown nothing of it would be seen. */
export function definitionsShown(block: string): string {
  return DEFINITION.test(block) ? block.replaceAll(new RegExp(DEFINITION, "gm"), "$1\\[") : block;
}

/** The pieces; put together they are the text. */
export function blocksOf(text: string): string[] {
  const blocks: string[] = [];
  let block = "";
  let fence = "";
  let blank = false;
  let inList = false;
  for (const line of text.match(/[^\n]*\n|[^\n]+$/g) ?? []) {
    const isBlank = line.trim() === "";
    if (fence === "" && blank && !isBlank) {
      const goesOn =
        /^(?: {2,}|\t)/.test(line) || (inList && (LIST_ITEM.test(line) || MAY_BE_ITEM.test(line)));
      if (!goesOn) {
        blocks.push(block);
        block = "";
      }
    }
    if (block.trim() === "") inList = LIST_ITEM.test(line);
    const mark = FENCE.exec(line)?.[1];
    if (mark !== undefined) {
      if (fence === "") fence = mark;
      else if (mark.startsWith(fence) && line.trim() === mark) fence = "";
    }
    block += line;
    blank = isBlank;
  }
  if (block !== "") blocks.push(block);
  return blocks;
}
