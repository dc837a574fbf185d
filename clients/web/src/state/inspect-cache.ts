/** The cache's report and the KV comparison in words and parts. Pure. */

import type { KvRun, ModelFacts } from "../api/inspect";
import type { CacheReport } from "../api/types";

export type Tier = "device" | "host" | "disk" | "none";

export interface Part {
  tier: Tier;
  tokens: number;
}

/** What the last answer's prompt was made of: tokens found by tier, and those computed. */
export function reuse(report: CacheReport): Part[] {
  if (report.last_turn === null) return [];
  const { prompt_tokens: prompt, cached_tokens: found } = report.last_turn;
  const computed = prompt - found.device - found.host - found.disk;
  const parts: Part[] = [
    { tier: "device", tokens: found.device },
    { tier: "host", tokens: found.host },
    { tier: "disk", tokens: found.disk },
    { tier: "none", tokens: computed },
  ];
  return parts.filter((part) => part.tokens > 0);
}

/** Why the last answer computed what it did, as a sentence. */
export function whyComputed(report: CacheReport): string {
  const last = report.last_turn;
  if (last === null) return "No answer of this conversation was made here yet.";
  const { miss } = last;
  if (miss === null) {
    if (last.expected_tokens > 0) {
      return "Everything that had been computed before was found; only what was new was computed.";
    }
    const { device, host, disk } = last.cached_tokens;
    return device + host + disk === 0
      ? "Nothing of it had been computed before, so there was nothing to find."
      : "What was found is a beginning that other conversations share; the rest was new.";
  }
  switch (miss.reason) {
    case "evicted":
      return `From token ${miss.token} on the blocks had been given up for other conversations.`;
    case "corrupt":
      return `From token ${miss.token} on a file was damaged; it was removed and computed again.`;
    case "dropped":
      return `The oldest turns were left out to make room, so tokens from ${miss.token} on are others.`;
    case "template":
      return `The chat template writes the past another way now, from token ${miss.token} on.`;
    case "model":
      return "The turns were made with another model, and its tokens do not count here.";
    case "instructions":
      return `Other instructions came first, so tokens from ${miss.token} on are others.`;
    default:
      return `Less was found than expected, from token ${miss.token} on (${miss.reason}).`;
  }
}

/** The bytes that one number of a key or value takes. */
export const numberBytes = (model: ModelFacts): number =>
  model.kv_bytes_per_token / (2 * model.blocks * model.kv_heads * model.head_dim);

/** 23040 -> "22.5 KiB". */
export function bytes(count: number): string {
  let value = count;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024 || unit === "GiB") {
      return `${unit === "B" || value >= 100 ? Math.round(value) : value.toFixed(1)} ${unit}`;
    }
    value /= 1024;
  }
  return "";
}

const LONGEST_SHOW = 8;

/** How many times faster than it was the run is shown, so that nobody waits for long. */
export function showSpeed(run: KvRun): number {
  return Math.max(1, Math.ceil(run.without_cache.seconds / LONGEST_SHOW));
}

/** How far a clock is `elapsed` seconds (of the run's own time) after its start. */
export function clockAt(
  clock: { seconds: number },
  tokens: number,
  elapsed: number,
): { seconds: number; tokens: number; share: number; done: boolean } {
  const share = clock.seconds > 0 ? Math.min(1, elapsed / clock.seconds) : 1;
  return {
    seconds: Math.min(elapsed, clock.seconds),
    tokens: Math.floor(share * tokens),
    share,
    done: share === 1,
  };
}
