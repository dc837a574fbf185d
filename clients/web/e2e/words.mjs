/** What one has written is not lost: when it is refused, when it is stopped on its way, when one
 * looks elsewhere meanwhile, and when another window talks in the same session. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";
import {
  api,
  assertSame,
  composer,
  ended,
  imported,
  letters,
  open,
  say,
  session,
  shown,
  stored,
  writing,
} from "./talk.mjs";

const TURNS = /\/turns$/;
const SESSIONS = /\/v1\/sessions$/;
const CANCEL = /\/cancel$/;

await visit({ viewport: { width: 1360, height: 860 } }, async (page, seen, context) => {
  /** Until the field has these words. */
  const field = (where, words) =>
    where.waitForFunction(
      (wanted) => document.getElementById("composer")?.value === wanted,
      words,
      { polling: 20 },
    );
  const refuse = (status, code, headers = {}) =>
    page.route(TURNS, (route) =>
      route.fulfill({
        status,
        headers,
        json: { error: { message: "It is refused.", type: "error", code, param: null } },
      }),
    );
  const click = (where, name) => where.getByRole("button", { name, exact: true }).click();
  const questions = async (id) =>
    (await api("GET", `/v1/sessions/${id}/tree`)).turns
      .filter(({ role }) => role === "user")
      .map(({ content }) => content[0].text);

  // Refused for good: it can be edited, not tried again.
  const first = await session(3000, "First");
  const second = await session(3000, "Second");
  await open(page, first);
  await refuse(400, "context_length_exceeded");
  await say(page, "Too long.");
  await page.getByText("The context is full.").waitFor();
  assert.equal(await page.getByRole("button", { name: "Try again" }).count(), 0);
  await audit(page, "a message that is refused");
  await shot(page, "refused");
  await composer(page).fill("And more.");
  await click(page, "Edit");
  await field(page, "Too long.\nAnd more.");
  await page.unroute(TURNS);

  // Refused for now: given up, left for another session, and the page loaded again.
  await refuse(503, "queue_full", { "retry-after": "60" });
  await say(page, "Please.");
  await page.getByText("The server is full.").waitFor();
  await click(page, "Give up");
  await field(page, "Please.");
  await composer(page).press("Enter");
  await page.getByText("The server is full.").waitFor();
  const list = page.getByRole("navigation", { name: "Sessions" });
  await list.getByText("Second", { exact: true }).click();
  await page.getByRole("heading", { name: "Second" }).waitFor();
  await field(page, "");
  await list.getByText("First", { exact: true }).click();
  await field(page, "Please.");
  await composer(page).press("Enter");
  await page.getByText("The server is full.").waitFor();
  await page.reload();
  await field(page, "Please.");
  await page.unroute(TURNS);

  // On its way: the page says so, and Esc takes it back.
  let held;
  await page.route(TURNS, (route) => (held = route));
  await composer(page).press("Enter");
  await page.getByText("sending").waitFor();
  await audit(page, "a message on its way");
  await shot(page, "sending");
  await page.keyboard.press("Escape");
  await field(page, "Please.");
  await composer(page).press("Enter");
  await page.getByText("sending").waitFor();
  // Nor is it lost when one looks elsewhere; it arrives, and is in the field no more.
  await list.getByText("Second", { exact: true }).click();
  await page.getByRole("heading", { name: "Second" }).waitFor();
  await held.continue();
  await page.unroute(TURNS);
  await page.waitForFunction(
    (key) => localStorage.getItem(key) === null,
    `headwater.words.${first}`,
  );
  await list.getByText("First", { exact: true }).click();
  await writing(page, 20);
  assert.deepEqual(await questions(first), ["Please."]);
  await field(page, "");

  // An input method's own Esc and Enter are not for the page.
  await page.evaluate(() => {
    for (const [key, at] of [
      ["Escape", document.body],
      ["Enter", document.getElementById("composer")],
    ])
      at.dispatchEvent(new KeyboardEvent("keydown", { key, isComposing: true, bubbles: true }));
  });
  await writing(page, 60);

  // A Stop that does not arrive is taken back, and can be had again.
  await page.route(CANCEL, (route) => route.abort());
  await click(page, "Stop");
  await page.getByText("The answer could not be stopped.").waitFor();
  await page.unroute(CANCEL);
  await writing(page, (await shown(page)).length + 20);
  await click(page, "Stop");
  await ended(page);

  // Esc just after the server has it: the answer is stopped, and the words are not there twice.
  const body = (route) => route.request().postData();
  const headers = { "content-type": "application/json" };
  await page.route(TURNS, (route) => {
    void fetch(route.request().url(), { method: "POST", headers, body: body(route) });
  });
  await say(page, "Already there.");
  while ((await api("GET", `/v1/sessions/${first}`)).generating === null);
  await page.keyboard.press("Escape");
  await page.locator(".said", { hasText: "Already there." }).waitFor();
  await ended(page);
  assert.equal((await stored(first)).status, "interrupted");
  await field(page, "");
  await page.unroute(TURNS);

  // The line breaks just after: it is said once, and its answer shown.
  let broken = 0;
  let mended;
  const whole = new Promise((done) => (mended = done));
  await page.route(/\/tree$/, (route) => {
    if (broken++ < 2) return route.abort();
    mended();
    return route.continue();
  });
  await say(page, "Once.");
  await writing(page, 20);
  await whole;
  await click(page, "Stop");
  await ended(page);
  assert.deepEqual(await questions(first), ["Please.", "Already there.", "Once."]);
  await page.unroute(/\/tree$/);

  // In the very first message of a session, too.
  await page.keyboard.press("Control+Shift+O");
  await page.route(SESSIONS, (route) => (held = route));
  await say(page, "A beginning.");
  await page.getByText("sending").waitFor();
  await page.keyboard.press("Escape");
  await field(page, "A beginning.");
  await held.continue();
  await page.unroute(SESSIONS);
  await composer(page).press("Enter");
  await page.waitForURL(/\/s\/sess_/);
  await writing(page, 10);
  await field(page, "");
  await click(page, "Stop");
  await ended(page);

  // An edit of what was said long ago outlives the row that it is in.
  const long = await imported(
    "Long",
    Array.from({ length: 120 }, (_, i) => `Words that stand in turn ${i}.`),
  );
  await open(page, long);
  await page.getByText("in turn 118.").waitFor();
  await page.getByRole("log").focus();
  await page.keyboard.press("Home");
  await page.getByText("in turn 0.").waitFor();
  await page.getByRole("button", { name: "Edit, as another branch" }).first().click();
  const edit = page.getByLabel("What you said, to be changed");
  await edit.fill("Other words.");
  await page.getByRole("log").focus();
  await page.keyboard.press("End");
  await page.getByText("in turn 118.").waitFor();
  await edit.waitFor({ state: "detached" });
  await page.keyboard.press("Home");
  await edit.waitFor();
  assert.equal(await edit.inputValue(), "Other words.");
  await click(page, "Cancel");
  await page.getByRole("button", { name: "Edit, as another branch" }).first().click();
  assert.equal(await edit.inputValue(), "Words that stand in turn 0.");

  // Two windows. One continues an answer that is not the last one any more: nothing is mixed up.
  const shared = await session(24, "Shared");
  const other = await context.newPage();
  await open(page, shared);
  await say(page, "Name a river.");
  await ended(page);
  const one = await stored(shared);
  await open(other, shared);
  await other.getByRole("button", { name: "Continue" }).waitFor();
  await page.bringToFront();
  await say(page, "Name a lake.");
  await page.locator(".said", { hasText: "Name a lake." }).waitFor();
  await ended(page);
  const two = await stored(shared);
  await other.bringToFront();
  await other.getByRole("button", { name: "Continue" }).click();
  await other.getByText("This conversation went on in another window.").waitFor();
  await other.locator(".said", { hasText: "Name a lake." }).waitFor();
  assertSame(await shown(other), two.text);
  const { turns } = await api("GET", `/v1/sessions/${shared}/tree`);
  assert.deepEqual(
    turns.filter(({ role }) => role === "assistant").map(({ num_tokens }) => num_tokens),
    [one.num_tokens, two.num_tokens],
  );
  // Now it is the last one.
  await other.getByRole("button", { name: "Continue" }).click();
  await writing(other, two.text.length + 10);
  await click(other, "Stop");
  await ended(other);
  const longer = await stored(shared);
  assert.ok(longer.text.startsWith(two.text));
  assertSame(await shown(other), longer.text);

  // One speaks while the other is being answered: it sees that answer, waits, and then sends.
  await open(page, second);
  await open(other, second);
  await page.bringToFront();
  await say(page, "Tell me the story of a sea.");
  await writing(page, 20);
  await other.bringToFront();
  await say(other, "And mine?");
  await other.getByText("Another window is being answered in this conversation.").waitFor();
  await writing(other, 40);
  assert.equal(await other.getByText("on_busy").count(), 0);
  assert.equal(await other.getByRole("button", { name: "Send", exact: true }).isDisabled(), true);
  await audit(other, "a message that waits for another window");
  await shot(other, "busy");
  await other.keyboard.press("Escape");
  await field(other, "And mine?");
  assert.equal((await stored(second)).status, "running");
  await other.keyboard.press("Escape"); // now it is the answer that is stopped
  await ended(other);
  await page.bringToFront();
  await ended(page);
  await say(page, "Go on.");
  await writing(page, 20);
  await other.bringToFront();
  await composer(other).press("Enter");
  await other.getByText("Another window is being answered in this conversation.").waitFor();
  await writing(other, 20);
  await click(page, "Stop");
  await other.getByText("you can send this now").waitFor();
  await click(other, "Send");
  await other.getByText("you can send this now").waitFor({ state: "detached" });
  await writing(other, 20);
  assert.deepEqual(await questions(second), [
    "Tell me the story of a sea.",
    "Go on.",
    "And mine?",
  ]);
  await click(other, "Stop");
  await ended(other);
  assert.equal(letters(await shown(other)), letters((await stored(second)).text));
  assertQuiet(seen);
});
report({});
