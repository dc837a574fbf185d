import { useEffect, useState } from "react";

import { ApiError } from "../../api/client";

export interface Loaded<T> {
  /** The newest value that came, also while another one is being asked for. */
  value: T | null;
  loading: boolean;
  error: ApiError | null;
  retry(): void;
}

/** Answers to what was asked before: the same tokens give the same numbers. */
const kept = new Map<string, unknown>();
const MAX_KEPT = 40;
/** Who drags a slider asks for the last value only. */
const SETTLE_MS = 120;

/** What `load` gives for `key`; null loads nothing. Another key drops the request for the one
 * before, which ends it at the server too. */
export function useLoaded<T>(
  key: string | null,
  load: (signal: AbortSignal) => Promise<T>,
  { keep = true }: { keep?: boolean } = {},
): Loaded<T> {
  const [tries, setTries] = useState(0);
  const [got, setGot] = useState<{ key: string | null; value: T | null; error: ApiError | null }>({
    key: null,
    value: null,
    error: null,
  });
  const there = key !== null && keep && kept.has(key);

  useEffect(() => {
    if (key === null) return;
    if (keep && kept.has(key)) {
      setGot({ key, value: kept.get(key) as T, error: null });
      return;
    }
    const leave = new AbortController();
    const timer = setTimeout(() => {
      load(leave.signal).then(
        (value) => {
          if (leave.signal.aborted) return;
          if (keep) remember(key, value);
          setGot({ key, value, error: null });
        },
        (cause: unknown) => {
          if (leave.signal.aborted) return;
          const error =
            cause instanceof ApiError ? cause : new ApiError(0, { message: String(cause) });
          setGot((before) => ({ ...before, key, error }));
        },
      );
    }, SETTLE_MS);
    return () => {
      clearTimeout(timer);
      leave.abort();
    };
    // `load` is a function of the key.
  }, [key, tries, keep]);

  return {
    value: there ? (kept.get(key) as T) : got.value,
    loading: key !== null && !there && got.key !== key,
    error: got.key === key ? got.error : null,
    retry() {
      setGot((before) => ({ ...before, key: null, error: null }));
      setTries((count) => count + 1);
    },
  };
}

function remember(key: string, value: unknown): void {
  kept.set(key, value);
  if (kept.size > MAX_KEPT) {
    const oldest = kept.keys().next();
    if (!oldest.done) kept.delete(oldest.value);
  }
}
