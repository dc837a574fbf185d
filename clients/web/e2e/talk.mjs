/** What the scripts of the chat share: sessions made through the API, and hands on the page. */

import assert from "node:assert/strict";
import { url } from "./browser.mjs";

/** The JSON of an answer of the server; fails for any that is no success. */
export async function api(method, path, body) {
  const response = await fetch(url + path, {
    method,
    headers: body === undefined ? {} : { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${await response.clone().text()}`);
  return response.status === 204 ? null : response.json();
}

/** A new session whose answers have exactly so many tokens. */
export async function session(maxTokens, title = "A test") {
  const defaults = { max_tokens: maxTokens, ignore_eos: true, seed: 7 };
  const { id } = await api("POST", "/v1/sessions", { title, defaults });
  return id;
}

/** A new session in which these texts were said, by turns; the answers as the model's own tokens.
 * `fields` are of the session. */
export async function imported(title, texts, fields = {}) {
  const spelled = new Map();
  const ids = (text) => {
    if (!spelled.has(text)) spelled.set(text, api("POST", "/tokenize", { text }));
    return spelled.get(text).then(({ tokens }) => tokens);
  };
  const turns = await Promise.all(
    texts.map(async (text, i) => ({
      id: `t${i}`,
      parent: i === 0 ? null : `t${i - 1}`,
      role: i % 2 === 0 ? "user" : "assistant",
      content: [{ type: "text", text }],
      token_ids: i % 2 === 0 ? [] : await ids(text),
      tokenizer: await fingerprint(),
      created_at: 0,
    })),
  );
  const head = turns.at(-1).id;
  const defaults = { max_tokens: 40, ignore_eos: true };
  const session = { title, head, created_at: 0, defaults, ...fields };
  const document = { format: "headwater.session", version: 1, session, turns };
  return (await api("POST", "/v1/sessions/import", document)).id;
}

let known;

/** The name of the served tokenizer, as an export has it. */
function fingerprint() {
  known ??= (async () => {
    const { id } = await api("POST", "/v1/sessions", {});
    await api("POST", `/v1/sessions/${id}/turns`, { input: "Hello", answer: false });
    const { turns } = await api("GET", `/v1/sessions/${id}/export`);
    await api("DELETE", `/v1/sessions/${id}`);
    return turns[0].tokenizer;
  })();
  return known;
}

export const composer = (page) => page.getByLabel("What to say");

/** Until the session is there; the composer is, before it. */
export async function open(page, id) {
  await page.goto(`${url}/s/${id}`);
  await page.getByRole("navigation", { name: "Views of this session" }).waitFor();
}

export async function say(page, words) {
  await composer(page).fill(words);
  await composer(page).press("Enter");
}

/** Until an answer is being written, and has so many characters. */
export const writing = (page, characters = 1) =>
  page.waitForFunction(
    (least) => {
      const prose = document.querySelector("[aria-busy=true] .prose");
      return prose !== null && prose.textContent.length >= least;
    },
    characters,
    { polling: 20, timeout: 60_000 },
  );

/** Until nothing is being written. */
export const ended = (page) =>
  page.waitForFunction(
    () =>
      document.querySelector("[aria-busy=true]") === null &&
      document.querySelector("button[aria-label=Send]") !== null &&
      document.querySelector("[aria-label='Answer again']") !== null,
    null,
    { polling: 20, timeout: 90_000 },
  );

/** The last answer that is shown. */
export const shown = (page) =>
  page
    .locator(".turn-answer .prose")
    .last()
    .evaluate((prose) => prose.textContent);

/** The last answer that the server has, on the path to the head. */
export async function stored(id) {
  const { turns } = await api("GET", `/v1/sessions/${id}`);
  const last = turns.at(-1);
  return { ...last, text: last.content.map((item) => item.text).join("") };
}

/** Letters and digits only: what Markdown makes of the rest does not count. */
export const letters = (text) => text.replace(/[^\p{L}\p{N}]/gu, "");

export function assertSame(page, server) {
  assert.equal(letters(page), letters(server));
}
