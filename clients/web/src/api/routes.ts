/** The routes that the chat uses, by name. All raise as `request` does. */

import { request, requestJson } from "./client";
import type { CacheReport, List, ModelCard, Sampling, Session, Tree, Turn } from "./types";

export interface NewSession {
  title?: string;
  instructions?: string;
  defaults?: Sampling;
  overflow?: Session["overflow"];
}

/** What makes an answer: appending, another answer to the same turn, or going on with one. */
export type AnswerRequest =
  | { kind: "turns"; input: string; parent?: string | null }
  | { kind: "regenerate"; turn: string }
  | { kind: "continue"; max_tokens?: number };

const session = (id: string) => `/v1/sessions/${encodeURIComponent(id)}`;
const stream = (id: string) => `/v1/streams/${encodeURIComponent(id)}`;

export const login = (apiKey: string) => request("POST", "/v1/login", { api_key: apiKey });
export const logout = () => request("POST", "/v1/logout");
export const models = () => requestJson<List<ModelCard>>("GET", "/v1/models");

export function listSessions(query: string, after: string | null): Promise<List<Session>> {
  const search = new URLSearchParams({ limit: "50" });
  if (query !== "") search.set("q", query);
  if (after !== null) search.set("after", after);
  return requestJson("GET", `/v1/sessions?${search.toString()}`);
}

export const createSession = (body: NewSession, key: string) =>
  request("POST", "/v1/sessions", body, { idempotencyKey: key }).then(
    (response) => response.json() as Promise<Session>,
  );
export const readSession = (id: string, tokenIds = false) =>
  requestJson<Session & { turns: Turn[] }>(
    "GET",
    session(id) + (tokenIds ? "?include=token_ids" : ""),
  );
export const readTree = (id: string) => requestJson<Tree>("GET", `${session(id)}/tree`);
export const changeSession = (
  id: string,
  change: { title?: string | null; defaults?: Sampling; head?: string },
) => requestJson<Session>("PATCH", session(id), change);
/** `keepalive`: also when the page is being closed. */
export const deleteSession = (id: string, keepalive = false) =>
  request("DELETE", session(id), undefined, { keepalive });
export const cancelAnswer = (id: string, signal: AbortSignal) =>
  requestJson("POST", `${session(id)}/cancel`, undefined, signal);
export const forkSession = (id: string, at: string) =>
  requestJson<Session>("POST", `${session(id)}/fork`, { at });
/** A fork has its parent's title at first. */
export const nameFork = (fork: Session) =>
  changeSession(fork.id, { title: `${fork.title ?? "Untitled"} (fork)`.slice(0, 1024) });
export const importSession = (transcript: unknown) =>
  requestJson<Session>("POST", "/v1/sessions/import", transcript);
export const readCache = (id: string) => requestJson<CacheReport>("GET", `${session(id)}/cache`);
export const exportPath = (id: string, format: "json" | "markdown") =>
  `${session(id)}/export?format=${format}`;

/** Starts an answer; the response is its event stream. */
export function startAnswer(
  id: string,
  wanted: AnswerRequest,
  key: string,
  signal: AbortSignal,
): Promise<Response> {
  const { kind, ...body } = wanted;
  return request(
    "POST",
    `${session(id)}/${kind}`,
    { ...body, stream: true },
    {
      idempotencyKey: key,
      signal,
    },
  );
}

/** The events of a generation after the place `after`; 204 when there are no more. */
export const readStream = (generation: string, after: number, signal: AbortSignal) =>
  request("GET", `${stream(generation)}?after=${after}`, undefined, { signal });

/** How many tokens the text has. */
export const countTokens = (text: string, signal: AbortSignal) =>
  requestJson<{ count: number }>("POST", "/tokenize", { text }, signal).then((told) => told.count);

/** Tokens per second of one answer, as a mean over the answers since the server started; null
 * where there was none. From Prometheus' text format. */
export async function meanSpeed(): Promise<number | null> {
  const text = await (await request("GET", "/metrics")).text();
  const value = (name: string) => {
    const line = text
      .split("\n")
      .find((l) => l.startsWith(`headwater_inter_token_seconds_${name} `));
    return Number(line?.split(" ")[1] ?? 0);
  };
  const [sum, count] = [value("sum"), value("count")];
  return sum > 0 ? count / sum : null;
}

/** A short answer that nobody reads, so that there is a speed to tell. */
export const measure = () =>
  requestJson("POST", "/v1/completions", {
    prompt: "A river begins",
    max_tokens: 24,
    ignore_eos: true,
  });
