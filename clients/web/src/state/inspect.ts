/** What the microscope works out from what the server answers. Pure. */

import type { Alternative, Forward, ModelFacts, Piece } from "../api/inspect";
import type { Sampling, Turn } from "../api/types";
import { PARAMETERS } from "./sampling";

/** The tokens of a path up to an answer's end; the answer's own begin at `start`. */
export interface PathTokens {
  ids: number[];
  start: number;
}

/** Null when the turn is not on the path, or is still being written. */
export function pathTokens(turns: readonly Turn[], turnId: string): PathTokens | null {
  const at = turns.findIndex((turn) => turn.id === turnId);
  const answer = turns[at];
  if (answer === undefined || answer.status === "running") return null;
  let ids: number[] = [];
  let start = 0;
  for (const turn of turns.slice(0, at + 1)) {
    if (turn.replaces_history === true) ids = [];
    ids = ids.concat(turn.prompt_token_ids ?? []);
    start = ids.length;
    ids = ids.concat(turn.token_ids ?? []);
  }
  return { ids, start };
}

/** A part of a text's tokens, [from, to). */
export interface Span {
  from: number;
  to: number;
}

const STRIDE = 64;

/** At most `limit` tokens with `index` among them, as many as can be before it. It stays the same
 * for neighbouring tokens, so that going from one to the next asks the server nothing. */
export function spanAround(length: number, index: number, limit: number): Span {
  if (length <= limit) return { from: 0, to: length };
  const to = Math.min(length, (Math.floor(index / STRIDE) + 1) * STRIDE);
  return { from: Math.max(0, to - limit), to };
}

/** The LM head reads every token in every layer that is asked for; of a long text, only in some. */
const LONG = 160;
const SOME_LAYERS = 10;

/** The layers to look at: all, or for a long text some, the first and the last among them. */
export function layersFor(tokens: number, blocks: number): number[] {
  const count = tokens <= LONG ? blocks : Math.min(blocks, SOME_LAYERS);
  if (count < 2) return [0];
  return Array.from({ length: count }, (_, i) => Math.round((i * (blocks - 1)) / (count - 1)));
}

/** A token with what the model expected in its place. */
export interface SeenToken extends Piece {
  /** Its place in the whole path. */
  index: number;
  /** Part of the answer, not of the prompt. */
  answer: boolean;
  /** Null where nothing is before it that could tell. */
  drawn: { prob: number; logprob: number; rank: number } | null;
  entropy: number;
  alternatives: Alternative[];
}

/** Each token of a forward pass beside the prediction of the position before it. */
export function seenTokens(forward: Forward, from: number, start: number): SeenToken[] {
  return forward.tokens.map((piece, i) => {
    const before = forward.positions[i - 1];
    return {
      ...piece,
      index: from + i,
      answer: from + i >= start,
      drawn: before?.next ?? null,
      entropy: before?.entropy ?? 0,
      alternatives: before?.top ?? [],
    };
  });
}

export interface Summary {
  tokens: number;
  /** exp of the mean of -logprob: between how many equally likely tokens it chose, in the mean. */
  perplexity: number;
  /** How many were not the most probable one. */
  notFirst: number;
}

export function summary(tokens: readonly SeenToken[]): Summary | null {
  const drawn = tokens.flatMap((token) => (token.answer && token.drawn ? [token.drawn] : []));
  if (drawn.length === 0) return null;
  const mean = drawn.reduce((sum, { logprob }) => sum + logprob, 0) / drawn.length;
  return {
    tokens: drawn.length,
    perplexity: Math.exp(-mean),
    notFirst: drawn.filter(({ rank }) => rank > 1).length,
  };
}

/** The penalties that are set, as "repetition penalty 1.1"; a session's own go before the model's. */
export function penalties(session: Sampling, model: Sampling = {}): string[] {
  const off = { repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
  return PARAMETERS.flatMap(({ name, label }) => {
    if (!(name in off)) return [];
    const value = session[name] ?? model[name];
    return value === undefined || value === off[name as keyof typeof off]
      ? []
      : [`${label.toLowerCase()} ${value}`];
  });
}

/** Where the eye should begin: at the first token of the answer that was not the first choice. */
export function firstSurprise(tokens: readonly SeenToken[], start: number): number {
  const found = tokens.find((token) => token.answer && token.drawn && token.drawn.rank > 1);
  return found?.index ?? start;
}

export type View = "next" | "attention" | "lens" | "norms" | "shapes";
export type Measure = "weights" | "scores" | "values_share";

export interface Look {
  view: View;
  /** A token's place in the path. */
  selected: number;
  layer: number;
  head: number;
  measure: Measure;
  /** Leave the first token out: most heads put there what they have no use for. */
  skipFirst: boolean;
}

export type LookAction =
  | { do: "view"; view: View }
  | { do: "select"; index: number }
  | { do: "layer"; layer: number }
  | { do: "head"; head: number }
  | { do: "measure"; measure: Measure }
  | { do: "skipFirst"; skipFirst: boolean };

/** The head by which the default model finds "cat" from the "it" of the first screen's example. */
export const NOUN_HEAD = { model: "smollm2-135m", layer: 9, head: 4 };

/** A head to begin with. */
export const firstHead = (model: ModelFacts): { layer: number; head: number } =>
  model.model === NOUN_HEAD.model
    ? { layer: NOUN_HEAD.layer, head: NOUN_HEAD.head }
    : { layer: Math.floor(model.blocks / 3), head: 0 };

/** The place of the example's "it"; null in another text. */
export function exampleIt(tokens: readonly SeenToken[]): number | null {
  const words = ["Sarah", " fed", " the", " cat", " because", " it"];
  const at = tokens.findIndex((_, i) => words.every((word, j) => tokens[i + j]?.text === word));
  if (at < 0) return null;
  return tokens[at + words.length - 1]?.index ?? null;
}

export const firstLook = (selected: number): Look => ({
  view: "next",
  selected,
  layer: 0,
  head: 0,
  measure: "weights",
  skipFirst: true,
});

export function look(state: Look, action: LookAction): Look {
  switch (action.do) {
    case "view":
      return { ...state, view: action.view };
    case "select":
      return { ...state, selected: action.index };
    case "layer":
      return { ...state, layer: action.layer };
    case "head":
      return { ...state, head: action.head };
    case "measure":
      return { ...state, measure: action.measure };
    case "skipFirst":
      return { ...state, skipFirst: action.skipFirst };
  }
}
