import { useState } from "react";
import { useChat } from "./context";
import { ApiError } from "../api/client";

export function SignIn() {
  const chat = useChat();
  const [key, setKey] = useState("");
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<string | null>(null);

  async function submit() {
    setBusy(true);
    setError(null);
    try {
      await chat.signIn(key.trim());
    } catch (cause) {
      const refused = cause instanceof ApiError && cause.status === 401;
      setError(
        refused
          ? "This server does not know that key. Check it for a missing character, or ask whoever runs the server."
          : cause instanceof Error
            ? cause.message
            : String(cause),
      );
    } finally {
      setBusy(false);
    }
  }

  return (
    <main className="sign-in">
      <h1 className="wordmark">Headwater</h1>
      <p>This server answers those who have a key.</p>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void submit();
        }}
      >
        <label htmlFor="key">API key</label>
        <input
          id="key"
          type="password"
          autoComplete="current-password"
          autoFocus
          required
          value={key}
          aria-describedby={error === null ? undefined : "key-error"}
          aria-invalid={error !== null}
          onChange={(event) => setKey(event.target.value)}
        />
        <button type="submit" className="button button-primary" disabled={busy}>
          Sign in
        </button>
      </form>
      {error !== null && (
        <p id="key-error" role="alert" className="trouble">
          {error}
        </p>
      )}
      <p className="note">
        The key is sent once and not kept here; the server gives this browser a cookie that scripts
        cannot read.
      </p>
    </main>
  );
}
