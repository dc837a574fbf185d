import type { ReactNode } from "react";

import type { Loaded } from "./loaded";

/** What was loaded, or why there is nothing yet. What came before stays to be seen, faded. */
export function Waiting<T>(props: {
  of: Loaded<T>;
  what: string;
  children: (value: T) => ReactNode;
}) {
  const { value, loading, error, retry } = props.of;
  return (
    <div className="ms-loaded" aria-busy={loading}>
      {error !== null && (
        <p className="ms-error" role="alert">
          {error.message}{" "}
          <button type="button" className="button" onClick={retry}>
            Try again
          </button>
        </p>
      )}
      {value !== null ? (
        <div className={loading ? "ms-stale" : undefined}>{props.children(value)}</div>
      ) : (
        error === null && <p className="ms-wait">{props.what}</p>
      )}
    </div>
  );
}
