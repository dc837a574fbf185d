/** The microscope, the cache and the comparison: each shows what the server's answers say, works by
 * keyboard, in the dark and on a phone, and a token that is chosen forks the session there. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";
import { api, composer, ended, imported, open, say, writing } from "./talk.mjs";

const label = (text) => text.replace(/\n/g, "⏎").replace(/ /g, "·");
const shortened = (text, length) => {
  const characters = Array.from(label(text));
  return characters.length <= length ? label(text) : `${characters.slice(0, length - 1).join("")}…`;
};
const percent = (text) => Number(text.replace(/[%<]/g, "")) / 100;

/** A session with one answer, and what the API tells of its tokens. */
async function specimen() {
  const { id } = await api("POST", "/v1/sessions", { title: "Sarah and the cat" });
  await api("POST", `/v1/sessions/${id}/turns`, {
    input: "Sarah fed the cat because it",
    max_tokens: 20,
    ignore_eos: true,
    seed: 5,
    temperature: 1,
  });
  const { turns } = await api("GET", `/v1/sessions/${id}?include=token_ids`);
  const answer = turns.at(-1);
  const prompt = turns.flatMap((turn) => [
    ...turn.prompt_token_ids,
    ...(turn === answer ? [] : turn.token_ids),
  ]);
  const ids = [...prompt, ...answer.token_ids];
  const forward = await api("POST", "/v1/inspect/forward", {
    token_ids: ids,
    top_k: 10,
    layers: "all",
  });
  return { id, answer, ids, start: prompt.length, forward };
}

const { id, answer, ids, start, forward } = await specimen();
const address = `${url}/s/${id}?turn=${answer.id}`;
const model = await api("GET", "/v1/inspect/model");

const strip = (page) => page.getByRole("listbox", { name: "Tokens" });
const token = (page, index) => strip(page).locator(`[data-index="${index}"]`);
const tab = async (page, name) => page.getByRole("tab", { name }).click();
const wide = (page) =>
  page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);

/** Until what is asked for now is there. */
async function settled(page) {
  await page.waitForFunction(
    () =>
      document.querySelector(".ms") !== null &&
      document.querySelector(".ms [aria-busy=true]") === null,
    null,
    { timeout: 60_000 },
  );
}

async function openTokens(page) {
  await page.goto(`${url}/s/${id}`);
  await page.getByRole("button", { name: "Tokens", exact: true }).click();
  await strip(page).waitFor({ timeout: 60_000 });
}

await visit({ viewport: { width: 1400, height: 950 } }, async (page, seen) => {
  await openTokens(page);
  await tokens(page);
  await byKeyboard(page);
  await attention(page);
  await lens(page);
  await norms(page);
  await shapes(page);
  await fork(page);
  await nothing(page);
  await halves(page);
  await longText(page);
  await cache(page);
  await comparison(page);
  assertQuiet(seen);
});

// On a phone, at night: whatever is wider than it, or too pale.
await visit(
  { colorScheme: "dark", viewport: { width: 320, height: 700 }, hasTouch: true },
  async (page, seen) => {
    await page.goto(address);
    await strip(page).waitFor({ timeout: 60_000 });
    for (const view of ["Next token", "Attention", "Logit lens", "Norms", "Shapes"]) {
      await tab(page, view);
      await settled(page);
      await audit(page, `${view} on a phone`);
      assert.ok((await wide(page)) <= 0, `${view} is wider than the phone`);
      await shot(page, `microscope-phone-${view.toLowerCase().replace(" ", "-")}`);
    }
    await page.goto(`${url}/s/${id}?view=cache`);
    await page.locator(".ms-block-cell").first().waitFor();
    await audit(page, "the cache on a phone");
    assert.ok((await wide(page)) <= 0, "the cache is wider than the phone");
    await shot(page, "microscope-phone-cache");
    assertQuiet(seen);
  },
);
report({});

/** Every token is there with the probability that the API gives, and its alternatives. */
async function tokens(page) {
  assert.equal(await strip(page).getByRole("option").count(), ids.length);
  for (let index = 1; index < ids.length; index += 7) {
    const next = forward.positions[index - 1].next;
    const title = await token(page, index).getAttribute("title");
    assert.ok(title.endsWith(`rank ${next.rank}`), `${title}, not rank ${next.rank}`);
  }
  await token(page, start + 3).click();
  const rows = page.locator(".ms-bars tbody tr");
  const top = forward.positions[start + 2].top;
  for (const [i, { text, prob }] of top.entries()) {
    assert.equal(await rows.nth(i).getByRole("rowheader").textContent(), shortened(text, 24));
    const shown = percent(await rows.nth(i).locator(".ms-bar-value").textContent());
    assert.ok(Math.abs(shown - prob) < 0.006, `${shown} for ${prob}`);
  }
  const { data } = await api("GET", "/v1/models");
  assert.match(
    await page.locator(".ms-panel").textContent(),
    new RegExp(`repetition penalty ${data[0].sampling_defaults.repetition_penalty}`),
    "what else decides the draw is named",
  );
  await audit(page, "the next token");
  await shot(page, "microscope-next");

  await token(page, start - 1).click();
  assert.equal(await page.locator(".ms-choose").count(), 0, "the prompt cannot be drawn anew");
  await page.getByLabel(/with the prompt/).uncheck();
  assert.equal(await strip(page).getByRole("option").count(), ids.length - start);
  await page.getByLabel(/with the prompt/).check();
}

async function byKeyboard(page) {
  const chosen = () =>
    strip(page).locator("[aria-selected=true]").getAttribute("data-index").then(Number);
  await strip(page).focus();
  await page.keyboard.press("End");
  assert.equal(await chosen(), ids.length - 1);
  await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("ArrowUp");
  assert.equal(await chosen(), ids.length - 12);
  await page.keyboard.press("Home");
  assert.equal(await chosen(), 0);
  assert.match(await page.locator(".ms-panel").textContent(), /Nothing stands before/);
  const active = await strip(page).getAttribute("aria-activedescendant");
  assert.equal(await token(page, 0).getAttribute("id"), active);
  await page.keyboard.press("Tab");
  await page.keyboard.press("ArrowRight");
  assert.equal(
    await page.getByRole("tab", { selected: true }).textContent(),
    "Attention",
    "arrows go from tab to tab",
  );
}

/** What `it` looks at is what the API says. */
async function attention(page) {
  const it = forward.tokens.findIndex(({ text }) => text === " it");
  await token(page, it).click();
  await settled(page);
  if (model.model === "smollm2-135m") await example(page, it);
  await page.getByRole("combobox", { name: "Head" }).selectOption("2");
  await page.getByRole("slider").fill("4");
  await page.getByText("All heads of layer 4").waitFor();
  await settled(page);
  const told = await api("POST", "/v1/inspect/attention", {
    token_ids: ids,
    layer: 4,
    head: 2,
    queries: [it],
  });
  const weights = told.weights[0][0];
  const best = weights
    .map((value, key) => ({ value, key }))
    .slice(1)
    .sort((a, b) => b.value - a.value);

  await page.locator(".ms-details summary").click();
  const rows = page.locator(".ms-details tbody tr");
  for (let i = 0; i < 4; i++) {
    const cells = await rows.nth(i).locator("td").allTextContents();
    assert.ok(Math.abs(percent(cells[1]) - best[i].value) < 0.006, `${cells[1]}: ${best[i].value}`);
    assert.ok(Math.abs(Number(cells[0]) - told.scores[0][0][best[i].key]) < 0.06);
    assert.ok(Math.abs(percent(cells[2]) - told.values_share[0][0][best[i].key]) < 0.006);
  }
  assert.equal(await page.locator(".ms-head-card").count(), model.heads);

  // Another word under the pointer shows what that one looks at.
  const sentence = page.locator(".ms-reading + .ms-note");
  assert.match(await sentence.textContent(), /·it looks at/);
  const cat = forward.tokens.findIndex(({ text }) => text === " cat");
  await page.locator(`.ms-reading [data-key="${cat}"]`).hover();
  await page.waitForFunction(() =>
    document.querySelector(".ms-reading + .ms-note").textContent.includes("·cat looks at"),
  );
  await page.mouse.move(0, 0);

  const cell = page.locator(".ms-cell").nth(3);
  await cell.hover();
  await page.waitForFunction(() =>
    /looks at/.test(document.querySelector("figcaption").textContent),
  );
  await audit(page, "attention");
  await shot(page, "microscope-attention");
}

/** The view opens on the head that the first screen's example is about. */
async function example(page, it) {
  await page.getByText("All heads of layer 9").waitFor();
  assert.equal(await page.getByRole("combobox", { name: "Head" }).inputValue(), "4");
  const sentence = page.locator(".ms-reading + .ms-note");
  assert.match(await sentence.textContent(), /·it looks at ·cat/);
  await token(page, 0).click();
  await page.getByText("it can look at itself only").waitFor();
  await page.getByRole("button", { name: "Look from “it”" }).click();
  await page.waitForFunction(() =>
    document.querySelector(".ms-reading + .ms-note").textContent.includes("·it looks at ·cat"),
  );
  assert.equal(await token(page, it).getAttribute("aria-selected"), "true");
}

/** The last layer's word is the model's. */
async function lens(page) {
  await token(page, start + 3).click();
  await tab(page, "Logit lens");
  await settled(page);
  const rows = page.locator(".ms-lens tbody tr");
  assert.equal(await rows.count(), model.blocks);
  const { top } = forward.positions[start + 2];
  const column = await page
    .locator(".ms-lens thead th[aria-current]")
    .evaluate((th) => th.cellIndex);
  const last = await rows.first().locator("th, td").nth(column).textContent();
  assert.equal(last.replace(" (is it)", ""), shortened(top[0].text, 10));
  await audit(page, "the logit lens");
  await shot(page, "microscope-lens");
}

async function norms(page) {
  await tab(page, "Norms");
  await settled(page);
  await page.locator(".ms-details summary").click();
  const rows = page.locator(".ms-details tbody tr");
  assert.equal(await rows.count(), model.blocks);
  const shown = Number((await rows.first().locator("td").first().textContent()).replace(",", ""));
  const told = forward.layers[0].norms.residual[start + 3];
  assert.ok(Math.abs(shown - told) <= 0.01 * told, `${shown} for ${told}`);
  await audit(page, "the norms");
  await page.locator(".ms-details summary").click();
  await shot(page, "microscope-norms");
}

async function shapes(page) {
  await tab(page, "Shapes");
  await settled(page);
  const table = await page.locator(".ms-shapes").textContent();
  for (const axes of [
    [1, ids.length],
    [1, ids.length, model.hidden],
    [1, ids.length, model.vocabulary],
  ]) {
    const shape = `[${axes.map((axis) => axis.toLocaleString("en-US")).join(", ")}]`;
    assert.ok(table.includes(shape), `${shape} is not there`);
  }
  for (const width of [1360, 360]) {
    await page.setViewportSize({ width, height: 950 });
    await tab(page, "Norms");
    await tab(page, "Shapes");
    await settled(page);
    const hidden = await page.locator(".ms-shapes thead [aria-current]").evaluate((column) => {
      const view = column.closest(".ms-scroll").getBoundingClientRect();
      const { left, right } = column.getBoundingClientRect();
      return left < view.left - 1 || right > view.right + 1;
    });
    assert.ok(!hidden, `the chosen column is not in view, ${width} px wide`);
  }
  await page.setViewportSize({ width: 1400, height: 950 });
  await audit(page, "the shapes");
  await shot(page, "microscope-shapes");
}

/** Another token: a new session that begins with the same ones, and goes on by itself. */
async function fork(page) {
  await tab(page, "Next token");
  const at = 4;
  await token(page, start + at).click();
  const other = forward.positions[start + at - 1].top.find(
    ({ id: one }) => one !== ids[start + at] && !/[\n<]/.test(one.text ?? ""),
  );
  await page
    .locator(".ms-bars tbody tr")
    .filter({ has: page.getByRole("rowheader", { name: label(other.text), exact: true }) })
    .getByRole("button")
    .click();
  await page.waitForURL((now) => now.pathname !== `/s/${id}` && now.search === "");
  await composer(page).waitFor();
  const forked = new URL(page.url()).pathname.split("/").at(-1);
  await page
    .getByRole("button", { name: "Stop" })
    .click({ timeout: 3000 })
    .catch(() => undefined);
  await ended(page);
  await shot(page, "microscope-forked");

  const there = await api("GET", `/v1/sessions/${forked}?include=token_ids`);
  assert.equal(there.title, "Sarah and the cat (fork)");
  const made = there.turns.at(-1).token_ids;
  assert.deepEqual(made.slice(0, at + 1), [...answer.token_ids.slice(0, at), other.id]);
  assert.ok(made.length > at + 1, "it went on");
  const untouched = await api("GET", `/v1/sessions/${id}?include=token_ids`);
  assert.deepEqual(untouched.turns.at(-1).token_ids, answer.token_ids);
}

/** Where there is nothing to look at, the page says why, and looks when there is. */
async function nothing(page) {
  await page.goto(`${url}/s/${id}?turn=turn_${"0".repeat(32)}`);
  await page.getByText("There is no such turn in this conversation.").waitFor();

  const other = await api("POST", `/v1/sessions/${id}/regenerate`, {
    turn: answer.id,
    max_tokens: 10,
  });
  await page.goto(address);
  await page.getByText("lies on another branch").waitFor();
  await page.goto(`${url}/s/${id}?turn=${other.id}`);
  await strip(page).waitFor();
  await api("PATCH", `/v1/sessions/${id}`, { head: answer.id });

  const { id: talk } = await api("POST", "/v1/sessions", {
    defaults: { max_tokens: 150, ignore_eos: true },
  });
  await open(page, talk);
  await say(page, "Tell me of a river.");
  await writing(page);
  const { turns } = await api("GET", `/v1/sessions/${talk}`);
  await page.goto(`${url}/s/${talk}?turn=${turns.at(-1).id}`);
  await page.getByText("still being written").waitFor();
  await strip(page).waitFor({ timeout: 60_000 });
}

/** Pieces of a character are told apart by their bytes, among the candidates too. */
async function halves(page) {
  const talk = await imported("Faces", ["Smile.", "I am happy 😀😃"]);
  const { turns } = await api("GET", `/v1/sessions/${talk}`);
  await page.goto(`${url}/s/${talk}?turn=${turns.at(-1).id}`);
  await strip(page).focus();
  await page.keyboard.press("End");
  await page.waitForFunction(() => {
    const shown = [...document.querySelectorAll(".ms-bars tbody th")].map((th) => th.textContent);
    return shown.some((name) => name.startsWith("⟨")) && !shown.some((name) => name.includes("�"));
  });
  const shown = await page.locator(".ms-bars tbody th").allTextContents();
  assert.equal(new Set(shown).size, shown.length, shown.join(" "));
}

/** Of a long text a part is read; the table's places are those in all of it. */
async function longText(page) {
  const words = Array.from({ length: 210 }, (_, i) => `${i % 7} ${"abcdefghijk"[i % 11]}`);
  const talk = await imported("Long", ["Count.", words.join(" ")]);
  const { turns } = await api("GET", `/v1/sessions/${talk}?include=token_ids`);
  await page.goto(`${url}/s/${talk}?turn=${turns.at(-1).id}`);
  await strip(page).waitFor({ timeout: 60_000 });
  await strip(page).focus();
  await page.keyboard.press("End");
  await tab(page, "Attention");
  await page.locator(".ms-details summary").click();
  const count = turns.flatMap((turn) => [...turn.prompt_token_ids, ...turn.token_ids]).length;
  const places = await page.locator(".ms-details tbody th small").allTextContents();
  assert.ok(count > 600 && places.length > 0, `${count} tokens, ${places.length} rows`);
  for (const row of await page.locator(".ms-details tbody th").all()) {
    const place = Number(await row.locator("small").textContent());
    assert.ok(place > count - 512 && place <= count, `${place} of ${count}`);
    const spelled = await token(page, place - 1).textContent();
    assert.equal(await row.textContent(), `${label(spelled)} ${place}`);
  }
}

async function cache(page) {
  await page.goto(`${url}/s/${id}`);
  await page.getByRole("button", { name: "Cache", exact: true }).click();
  const told = await api("GET", `/v1/sessions/${id}/cache`);
  const cells = page.locator("button.ms-block-cell");
  await cells.first().waitFor();
  assert.equal(await cells.count(), told.blocks.length);
  await cells.first().click();
  const { text } = await api("POST", "/detokenize", { tokens: ids.slice(0, told.block_size) });
  await page.locator(".ms-words").waitFor();
  assert.equal(await page.locator(".ms-words").textContent(), text);
  assert.match(await page.locator(".ms-reuse + table").textContent(), /computed/);
  assert.match(
    await page.locator(".ms").textContent(),
    new RegExp(`${model.head_dim} numbers × 2 bytes`),
  );
  await audit(page, "the cache");
  await shot(page, "microscope-cache");
}

async function comparison(page) {
  await page.goto(`${url}/?view=kv`);
  await page.getByLabel("Tokens", { exact: true }).fill("8");
  await page.getByRole("button", { name: "Run both" }).click();
  await page.locator(".ms-clock").first().waitFor({ timeout: 90_000 });
  const [withCache, without] = await page.locator(".ms-clock-time").allTextContents();
  assert.ok(parseFloat(withCache) < parseFloat(without), `${withCache}, ${without}`);
  await page.getByText("all tokens are the same").waitFor();
  await audit(page, "the comparison");
  await shot(page, "microscope-kv");
}
