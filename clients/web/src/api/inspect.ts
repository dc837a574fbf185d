/** The wire of the glass box: /v1/inspect, and what the microscope needs of sessions. */

import { ApiError, newKey, request, requestJson } from "./client";
import { nameFork } from "./routes";
import type { CacheReport, Session, Turn } from "./types";

export interface Piece {
  id: number;
  text: string;
  bytes: number[];
  special: boolean;
}

export interface Alternative {
  id: number;
  text: string;
  logit: number;
  prob: number;
}

/** What the model expects after the token at `position`; `next` is what really came. */
export interface Position {
  position: number;
  entropy: number;
  top: Alternative[];
  next: { id: number; prob: number; logprob: number; rank: number } | null;
}

/** One layer's reading of every position. */
export interface Layer {
  layer: number;
  lens: { id: number; text: string; prob: number }[];
  norms: { residual: number[]; attention: number[]; feed_forward: number[] };
}

export interface Forward {
  tokens: Piece[];
  shapes: { input_ids: number[]; hidden: number[]; logits: number[] };
  positions: Position[];
  layers?: Layer[];
}

/** [head][query][key <= query]; `heads` and `queries` name the first two axes. */
export interface Attention {
  tokens: Piece[];
  layer: number;
  heads: number[];
  queries: number[];
  scores: number[][][];
  weights: number[][][];
  values_share: number[][][];
}

export interface ModelFacts {
  model: string;
  blocks: number;
  heads: number;
  kv_heads: number;
  head_dim: number;
  hidden: number;
  feed_forward: number;
  vocabulary: number;
  context_length: number;
  parameters: Record<string, number>;
  tied_embeddings: boolean;
  projections: Record<string, number[]>;
  kv_bytes_per_token: number;
  quantization: string;
  kernels: string;
}

export interface Clock {
  seconds: number;
  tokens_per_s: number;
}

export interface KvRun {
  prompt_tokens: number;
  tokens: number;
  with_cache: Clock;
  without_cache: Clock;
  speedup: number;
  tokens_equal: boolean;
  text: string;
}

/** The most tokens that one inspection takes. */
export const FORWARD_TOKENS = 4096;
export const LAYERS_TOKENS = 512;
export const ATTENTION_TOKENS = 512;
export const KV_TOKENS = 256;

export const TOP_K = 10;

export const readModel = (signal?: AbortSignal) =>
  requestJson<ModelFacts>("GET", "/v1/inspect/model", undefined, signal);

export const forward = (ids: number[], layers: number[], signal?: AbortSignal) =>
  requestJson<Forward>(
    "POST",
    "/v1/inspect/forward",
    { token_ids: ids, top_k: TOP_K, ...(layers.length > 0 ? { layers } : {}) },
    signal,
  );

/** What each of these ids is, its bytes too. */
export const pieces = async (ids: number[], signal?: AbortSignal) =>
  (
    await requestJson<Forward>(
      "POST",
      "/v1/inspect/forward",
      { token_ids: ids, top_k: 1 },
      signal,
    )
  ).tokens;

export const attention = (
  ids: number[],
  layer: number,
  head: number | "all",
  queries: number[],
  signal?: AbortSignal,
) =>
  requestJson<Attention>(
    "POST",
    "/v1/inspect/attention",
    { token_ids: ids, layer, head, queries },
    signal,
  );

export const compareKv = (prompt: string, maxTokens: number, signal?: AbortSignal) =>
  requestJson<KvRun>(
    "POST",
    "/v1/inspect/kv-cache",
    { messages: [{ role: "user", content: prompt }], max_tokens: maxTokens },
    signal,
  );

export const readCache = (session: string, signal?: AbortSignal) =>
  requestJson<CacheReport>("GET", `/v1/sessions/${session}/cache`, undefined, signal);

/** The turns from the root to the head, with their token ids. */
export const readTokens = (session: string, signal?: AbortSignal) =>
  requestJson<Session & { turns: Turn[] }>(
    "GET",
    `/v1/sessions/${session}?include=token_ids`,
    undefined,
    signal,
  );

export const spell = async (ids: number[], signal?: AbortSignal) =>
  (await requestJson<{ text: string }>("POST", "/detokenize", { tokens: ids }, signal)).text;

/** A new session that goes on with another token in place of the answer's `token`th; its id.
 * Raises ApiError when there is no fork. A fork that could not go on is there all the same: it
 * ends in an answer that can be continued. */
export async function forkAt(
  session: Session,
  turn: string,
  token: number,
  replace: number,
): Promise<string> {
  const fork = await requestJson<Session>("POST", `/v1/sessions/${session.id}/fork`, {
    at: turn,
    token,
    replace,
  });
  const limit = session.defaults.max_tokens;
  try {
    await nameFork(fork);
    const answer = await request(
      "POST",
      `/v1/sessions/${fork.id}/continue`,
      { stream: true, ...(limit === undefined ? {} : { max_tokens: limit }) },
      { idempotencyKey: newKey() },
    );
    // It goes on without a reader; the chat attaches by itself.
    await answer.body?.cancel();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
  return fork.id;
}
