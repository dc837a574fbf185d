/** Colours for code; a chunk of its own, fetched with the first code that is shown. */

import { toJsxRuntime } from "hast-util-to-jsx-runtime";
import { common, createLowlight } from "lowlight";
import type { ReactNode } from "react";
import { Fragment, jsx, jsxs } from "react/jsx-runtime";

const MAX_CHARACTERS = 50_000;
const lowlight = createLowlight(common);

/** The code as elements; null for a language that is not known. */
export function colour(text: string, language: string): ReactNode {
  if (!lowlight.registered(language) || text.length > MAX_CHARACTERS) return null;
  return toJsxRuntime(lowlight.highlight(language, text), { Fragment, jsx, jsxs });
}
