/** The one place that calls `fetch`. Everything goes to the origin that the page came from. */

import { SseDecoder, type SseFrame } from "./sse";
import type { WireError } from "./types";

/** What the server refused, or could not do. `status` 0: no answer came at all. */
export class ApiError extends Error {
  readonly status: number;
  readonly code: string;
  readonly param: string | null;
  /** Seconds after which the server wants to be asked again. */
  readonly retryAfter: number | null;

  constructor(status: number, error: Partial<WireError>, retryAfter: number | null = null) {
    super(error.message ?? `The server answered ${status} without saying why.`);
    this.name = "ApiError";
    this.status = status;
    this.code = error.code ?? "internal";
    this.param = error.param ?? null;
    this.retryAfter = retryAfter;
  }
}

export interface CallOptions {
  signal?: AbortSignal | undefined;
  idempotencyKey?: string | undefined;
  keepalive?: boolean | undefined;
}

/** The answer, if it is a success. Raises ApiError, or the signal's AbortError. */
export async function request(
  method: string,
  path: string,
  body?: unknown,
  options: CallOptions = {},
): Promise<Response> {
  const headers: Record<string, string> = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (options.idempotencyKey) headers["idempotency-key"] = options.idempotencyKey;
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      headers,
      credentials: "same-origin",
      body: body === undefined ? null : JSON.stringify(body),
      signal: options.signal ?? null,
      keepalive: options.keepalive ?? false,
    });
  } catch (cause) {
    if (options.signal?.aborted) throw cause;
    throw new ApiError(0, { message: "The server cannot be reached.", code: "unreachable" });
  }
  if (response.ok) return response;
  const said = (await response.json().catch(() => ({}))) as { error?: Partial<WireError> };
  const after = Number(response.headers.get("retry-after") ?? "");
  throw new ApiError(response.status, said.error ?? {}, after > 0 ? after : null);
}

/** The answer's JSON. Raises as `request` does. */
export async function requestJson<T>(
  method: string,
  path: string,
  body?: unknown,
  signal?: AbortSignal,
): Promise<T> {
  return (await (await request(method, path, body, { signal })).json()) as T;
}

/** The server pings each 10 s; a connection that is silent for longer is dead (sleep, a lost
 * network), which no error tells. */
const SILENCE_MS = 25_000;

/** The frames of an event stream as they come, one batch a read. Raises ApiError with status 0
 * when the connection breaks. */
export async function* frames(response: Response): AsyncGenerator<SseFrame[]> {
  if (response.body === null) return;
  const reader = response.body.getReader();
  const decoder = new SseDecoder();
  try {
    for (;;) {
      let timer: ReturnType<typeof setTimeout> | undefined;
      const silence = new Promise<never>((_, reject) => {
        timer = setTimeout(() => reject(new Error("silence")), SILENCE_MS);
      });
      const chunk = await Promise.race([reader.read(), silence]).finally(() => clearTimeout(timer));
      if (chunk.done) return;
      const batch = decoder.feed(chunk.value);
      if (batch.length > 0) yield batch;
    }
  } catch {
    throw new ApiError(0, { message: "The connection was lost.", code: "unreachable" });
  } finally {
    void reader.cancel().catch(() => undefined);
  }
}

/** A random key for one request, so that sending it twice makes one thing. */
export function newKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
