/**
 * A decoder of server-sent events without I/O: bytes in, frames out, however they are cut.
 *
 * Follows https://html.spec.whatwg.org/multipage/server-sent-events.html, and hands out comments
 * too: the server says in one that the engine is being restarted, and pings with them.
 */

export type SseFrame =
  | { kind: "event"; event: string; data: string; id: string | null }
  | { kind: "comment"; text: string };

export class SseDecoder {
  /** The id of the last event that had one: where a reader that comes back goes on. */
  lastEventId = "";

  #text = new TextDecoder("utf-8"); // takes a byte order mark away
  #line = "";
  #afterReturn = false;
  #event = "";
  #id: string | null = null;
  #data: string[] = [];

  /** The frames that these bytes complete. */
  feed(bytes: Uint8Array): SseFrame[] {
    const frames: SseFrame[] = [];
    let text = this.#text.decode(bytes, { stream: true });
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    if (text !== "") this.#afterReturn = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop() ?? "";
    for (const line of lines) {
      const frame = this.#take(line);
      if (frame !== null) frames.push(frame);
    }
    return frames;
  }

  #take(line: string): SseFrame | null {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (colon === 0) return { kind: "comment", text: value };
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = this.lastEventId = value;
    return null;
  }

  #dispatch(): SseFrame | null {
    const [event, data, id] = [this.#event || "message", this.#data, this.#id];
    this.#event = "";
    this.#data = [];
    this.#id = null;
    return data.length === 0 ? null : { kind: "event", event, data: data.join("\n"), id };
  }
}
