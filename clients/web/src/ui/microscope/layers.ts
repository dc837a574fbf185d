import { forward, LAYERS_TOKENS, type Forward, type ModelFacts } from "../../api/inspect";
import { layersFor, spanAround, type Span } from "../../state/inspect";
import { useLoaded, type Loaded } from "./loaded";

export interface Layers extends Span {
  answer: Forward;
}

/** The layers' readings of the tokens around one; three views share them. */
export function useLayers(
  ids: readonly number[],
  selected: number,
  model: ModelFacts,
): Loaded<Layers> {
  const span = spanAround(ids.length, selected, LAYERS_TOKENS);
  const part = ids.slice(span.from, span.to);
  return useLoaded(`layers ${part.join(",")}`, async (signal) => ({
    ...span,
    answer: await forward(part, layersFor(part.length, model.blocks), signal),
  }));
}
