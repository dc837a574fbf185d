/** The wire of Headwater's own routes, as far as the page uses it. Times are unix seconds. */

export interface ModelCard {
  id: string;
  max_model_len?: number;
  num_parameters?: number;
  quantization?: string;
  device?: string;
  dtype?: string;
  ops?: string;
  reproducible?: boolean;
  fingerprint?: string;
  sampling_defaults?: Partial<Record<string, number>>;
}

export interface Sampling {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  max_tokens?: number;
  seed?: number;
  stop?: string[];
}

export interface Session {
  id: string;
  title: string | null;
  instructions: string | null;
  metadata: Record<string, unknown>;
  defaults: Sampling & Record<string, unknown>;
  overflow: "error" | "drop_oldest";
  head: string | null;
  model: string;
  generating: string | null;
  created_at: number;
  updated_at: number;
}

export type TurnStatus = "complete" | "interrupted" | "running";

export interface Turn {
  id: string;
  session: string;
  parent: string | null;
  role: "system" | "user" | "assistant" | "tool";
  content: { type: string; text?: string }[];
  status: TurnStatus;
  finish_reason: string | null;
  generation: string | null;
  num_tokens: number;
  created_at: number;
  token_ids?: number[];
  prompt_token_ids?: number[];
  replaces_history?: boolean;
}

export interface List<T> {
  object: "list";
  data: T[];
  first_id: string | null;
  last_id: string | null;
  has_more: boolean;
}

export interface Tree {
  session: string;
  head: string | null;
  turns: Turn[];
}

/** Tokens by the tier they were found in. */
export interface Tiers {
  device: number;
  host: number;
  disk: number;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details: Tiers & { cached_tokens: number };
}

export interface Timings {
  queue_ms: number;
  ttft_ms: number;
  decode_tokens_per_s: number;
}

export interface WireError {
  message: string;
  type: string;
  code: string;
  param?: string | null;
}

/** The events of a session's answer. `id` is 1 + output tokens up to its end. */
export type StreamEvent =
  | {
      event: "progress";
      data: { queue_position?: number; prefill?: { done: number; total: number } };
    }
  | {
      event: "start";
      data: {
        generation: string;
        session: string | null;
        turn: string | null;
        model: string;
        seed: number;
        prompt_tokens: number;
        cached_tokens: Tiers;
      };
    }
  | { event: "delta"; data: { text: string; token_ids: number[] } }
  | {
      event: "done";
      data: {
        finish_reason: "stop" | "length" | "abort";
        usage: Usage;
        timings: Timings;
        turn: string | null;
      };
    }
  | { event: "error"; data: { error: WireError } };

/** Where a session's KV is: tokens per tier, and why the last answer found no more of it. */
export interface CacheReport {
  session: string;
  head: string | null;
  tokens: number;
  block_size: number;
  tiers: Tiers & { none: number };
  on_disk: number;
  blocks: {
    index: number;
    start: number;
    end: number;
    tier: "device" | "host" | "disk" | "none";
    device: boolean;
    disk: boolean;
  }[];
  last_turn: {
    turn: string;
    prompt_tokens: number;
    cached_tokens: Tiers;
    expected_tokens: number;
    miss: { reason: string; token: number; before?: string; after?: string } | null;
  } | null;
}
