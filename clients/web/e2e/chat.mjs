/** The chat, from the first visit on: stop, continue, answer again, edit, branches, fork, and what
 * can be done with sessions. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";
import {
  api,
  assertSame,
  composer,
  ended,
  open,
  say,
  session,
  shown,
  stored,
  writing,
} from "./talk.mjs";

await visit(
  { viewport: { width: 1360, height: 860 }, acceptDownloads: true },
  async (page, seen) => {
    // First visit to first streamed token, in three actions or less.
    let actions = 0;
    await page.goto(url);
    actions += 1;
    await page.getByRole("button", { name: /Write an email apologizing to Sarah/ }).waitFor();
    await page.getByText("smollm2-135m").waitFor();
    await page.getByText(/\d tokens\/s/).waitFor();
    await shot(page, "first");
    await audit(page, "the first screen");
    await page.getByRole("button", { name: /Write an email apologizing to Sarah/ }).click();
    actions += 1;
    await writing(page);
    assert.ok(actions <= 3);
    await page.waitForURL(/\/s\/sess_/);
    const first = new URL(page.url()).pathname.slice(3);

    // Which sessions are answering shows in the list; Esc stops, and what was said stays.
    await page.getByRole("img", { name: "answering" }).waitFor();
    await writing(page, 60);
    await shot(page, "streaming");
    await audit(page, "an answer that is being written");
    await page.keyboard.press("Escape");
    await ended(page);
    const stopped = await stored(first);
    assert.equal(stopped.status, "interrupted");
    assertSame(await shown(page), stopped.text);
    await page.getByText("It was stopped here.").waitFor();

    // Continue goes on with the same turn.
    await page.getByRole("button", { name: "Continue" }).click();
    await writing(page, stopped.text.length + 20);
    await page.getByRole("button", { name: "Stop" }).click();
    await ended(page);
    const longer = await stored(first);
    assert.equal(longer.id, stopped.id);
    assert.ok(longer.text.startsWith(stopped.text) && longer.text.length > stopped.text.length);
    assertSame(await shown(page), longer.text);

    // Answers that end by themselves, and tell their numbers in the margin.
    const id = await session(24, "Branches");
    await open(page, id);
    await say(page, "Name a river.");
    await ended(page);
    const one = await stored(id);
    assert.equal(one.num_tokens, 24);
    const margin = page.getByRole("complementary", { name: "About this answer" });
    for (const name of ["first token", "speed", "tokens", "prompt", "computed"]) {
      await margin.getByText(name, { exact: true }).waitFor();
    }

    // Another answer is a branch; the arrows go between them.
    await page.getByRole("button", { name: "Answer again" }).click();
    await page.getByText("2/ of 2").waitFor();
    await ended(page);
    const two = await stored(id);
    assert.notEqual(two.id, one.id);
    assertSame(await shown(page), two.text);
    await page.getByRole("button", { name: "Branch before" }).click();
    await page.getByText("1/ of 2").waitFor();
    assertSame(await shown(page), one.text);
    assert.equal((await stored(id)).id, one.id);
    await audit(page, "a conversation with branches");

    // Editing is a branch as well, and may begin at the root.
    await page.getByRole("button", { name: "Edit, as another branch" }).click();
    await page.getByLabel("What you said, to be changed").fill("Name a lake.");
    await page.getByRole("button", { name: "Send" }).first().click();
    await page.locator(".said", { hasText: "Name a lake." }).waitFor();
    await ended(page);
    const { turns } = await api("GET", `/v1/sessions/${id}/tree`);
    assert.deepEqual(
      turns.filter(({ role }) => role === "user").map(({ parent }) => parent),
      [null, null],
    );
    await page.locator(".turn-user").getByRole("button", { name: "Branch before" }).click();
    await page.locator(".said", { hasText: "Name a river." }).waitFor();
    await shot(page, "branches");

    // A fork is a session of its own.
    await page
      .locator(".turn-answer")
      .getByRole("button", { name: "Fork the session here" })
      .click();
    await page.waitForURL((address) => address.pathname !== `/s/${id}`);
    await page.getByRole("heading", { name: "Branches (fork)" }).waitFor();
    const fork = new URL(page.url()).pathname.slice(3);
    await say(page, "And another?");
    await ended(page);
    assert.equal((await api("GET", `/v1/sessions/${fork}`)).turns.length, 4);

    // A system prompt and parameters, for the next session.
    await page.keyboard.press("Control+Shift+O");
    await page.getByRole("button", { name: "System prompt and parameters" }).click();
    await page.getByRole("textbox", { name: /^System prompt/ }).fill("Answer in one word.");
    await page.getByLabel("Most tokens").fill("5");
    await page.getByLabel("Temperature").fill("9");
    await page.getByRole("button", { name: "Save" }).click();
    await page.getByRole("alert").getByText("from 0 to 2").waitFor();
    await shot(page, "parameters");
    await audit(page, "the parameters");
    await page.getByLabel("Temperature").fill("0");
    await page.getByRole("button", { name: "Save" }).click();
    await say(page, "Which ocean is the largest?");
    await ended(page);
    await page.waitForURL(/\/s\/sess_/);
    const mine = await api("GET", `/v1/sessions/${new URL(page.url()).pathname.slice(3)}`);
    assert.equal(mine.instructions, "Answer in one word.");
    assert.deepEqual(mine.defaults, { temperature: 0, max_tokens: 5 });

    // The same request from elsewhere.
    await page.getByRole("button", { name: "What to do with this session" }).click();
    await page.getByRole("menuitem", { name: "As curl or Python" }).click();
    await page.getByText("curl -N").waitFor();
    await page.getByLabel("Python").check();
    await page.getByText("from openai import OpenAI").waitFor();
    await audit(page, "the request as code");
    await page.keyboard.press("Escape");

    // What the next session begins with is no part of one that began without it.
    await open(page, id);
    await page.getByRole("button", { name: "System prompt and parameters" }).click();
    assert.equal(await page.getByRole("textbox", { name: /^System prompt/ }).inputValue(), "");
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "What to do with this session" }).click();
    await page.getByRole("menuitem", { name: "As curl or Python" }).click();
    const code = await page.locator("dialog pre").innerText();
    assert(code.includes("Name a river.") && !code.includes("one word"), code);
    await page.keyboard.press("Escape");
    await open(page, mine.id);

    // Export, and back in.
    await page.getByRole("button", { name: "What to do with this session" }).click();
    const [saved] = await Promise.all([
      page.waitForEvent("download"),
      page.getByRole("menuitem", { name: "Export as JSON" }).click(),
    ]);
    const before = await api("GET", "/v1/sessions?limit=100");
    await page.setInputFiles("input[type=file]", await saved.path());
    await page.waitForURL((address) => address.pathname !== `/s/${mine.id}`);
    await page.locator(".said", { hasText: "Which ocean" }).waitFor();
    const now = await api("GET", "/v1/sessions?limit=100");
    assert.equal(now.data.length, before.data.length + 1);

    // Search, rename, delete, and have it back.
    // A key that is struck right after a shortcut is for the field that it leads to.
    const focusAfter = (key) =>
      page.evaluate((struck) => {
        dispatchEvent(new KeyboardEvent("keydown", { ctrlKey: true, ...struck }));
        return document.activeElement?.id;
      }, key);
    assert.equal(await focusAfter({ key: "O", shiftKey: true }), "composer");
    await page.keyboard.press("Control+B");
    await page.locator(".sidebar").waitFor({ state: "detached" });
    assert.equal(await focusAfter({ key: "k" }), "search");
    await page.keyboard.type("Branches");
    const list = page.getByRole("navigation", { name: "Sessions" });
    await page.waitForFunction(() => document.querySelectorAll(".session").length === 2);
    await list.getByRole("button", { name: "What to do with “Branches”", exact: true }).click();
    await page.getByRole("menuitem", { name: "Rename" }).click();
    await page.getByLabel("Title of the session").fill("Rivers");
    await page.keyboard.press("Enter");
    await list.getByText("Rivers").waitFor();
    await page.waitForFunction(() => document.activeElement?.textContent === "Rivers");
    assert.equal((await api("GET", `/v1/sessions/${id}`)).title, "Rivers");
    await list.getByRole("button", { name: "What to do with “Rivers”" }).click();
    await page.getByRole("menuitem", { name: "Delete" }).click();
    await list.getByText("Rivers").waitFor({ state: "detached" });
    await shot(page, "deleted");
    await page.getByRole("button", { name: "Undo" }).click();
    await list.getByText("Rivers").waitFor();
    await api("GET", `/v1/sessions/${id}`);
    await list.getByRole("button", { name: "What to do with “Rivers”" }).click();
    await page.getByRole("menuitem", { name: "Delete" }).click();
    await page.goto("about:blank"); // closing the page does not bring it back
    for (let tries = 0; ; tries++) {
      const { status } = await fetch(`${url}/v1/sessions/${id}`);
      if (status === 404) break;
      assert.ok(tries < 100, "the session is still there");
    }
    assertQuiet(seen);
  },
);
report({});
