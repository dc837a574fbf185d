/** A session of HEADWATER_TURNS turns: it opens, scrolls, and streams at 300 tokens/s, and no frame
 * takes more than 50 ms meanwhile. The tokens are the server's; they are let through in that pace. */

import assert from "node:assert/strict";
import { createServer, request } from "node:http";
import { report, shot, url, visit } from "./browser.mjs";
import { assertSame, composer, ended, imported, say, shown, stored, writing } from "./talk.mjs";

const TURNS = Number(process.env.HEADWATER_TURNS ?? 1000);
const TOKENS = Number(process.env.HEADWATER_LENGTH ?? 1500);
const PER_SECOND = 300;
const MAX_FRAME_MS = Number(process.env.HEADWATER_MAX_FRAME_MS ?? 50);

/** The server behind a line that lets event streams through at one pace. */
async function paced() {
  const { hostname, port } = new URL(url);
  const server = createServer((near, answer) => {
    const { method, headers, url: path } = near;
    const far = request({ hostname, port, method, headers, path }, (told) => {
      answer.writeHead(told.statusCode, told.headers);
      if (!String(told.headers["content-type"]).startsWith("text/event-stream")) {
        told.pipe(answer);
        return;
      }
      let held = "";
      let over = false;
      told.setEncoding("utf8").on("data", (text) => (held += text));
      told.on("end", () => (over = true));
      const started = performance.now();
      let sent = 0;
      const timer = setInterval(() => {
        const due = ((performance.now() - started) / 1000) * PER_SECOND;
        let end = 0;
        for (; sent < due; sent++) {
          const next = held.indexOf("\n\n", end);
          if (next < 0) break;
          end = next + 2;
        }
        answer.write(held.slice(0, end));
        held = held.slice(end);
        if (over && held === "") {
          clearInterval(timer);
          answer.end();
        }
      }, 1000 / PER_SECOND);
    });
    near.pipe(far);
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return { url: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

// Words, sentences, paragraphs: what the tiny model says by itself is no text.
const PROSE = "(([a-z]{2,8} ){8,12}[a-z]{2,8}\\.( |\\n\\n)){1,400}";
const PARAGRAPH =
  "A river carries what the rain gives it, and takes the *shortest* way that it finds.\n\n";
const CODE =
  "```python\nfor bend in river:\n    print(bend)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n";

/** Milliseconds that each task of the page's main thread took, the least first: of the processor
 * (`tdur`), or by the clock on the wall (`dur`), which on a busy machine counts what others do. */
function mainThreadTasks({ traceEvents }, clock) {
  const main = traceEvents.find(
    ({ name, args }) => name === "thread_name" && args.name === "CrRendererMain",
  );
  return traceEvents
    .filter((event) => event.pid === main.pid && event.tid === main.tid)
    .filter((event) => event.name.endsWith("RunTask") && event[clock] !== undefined)
    .map((event) => event[clock] / 1000)
    .sort((a, b) => a - b);
}

const texts = Array.from({ length: TURNS }, (_, i) =>
  i % 2 === 0 ? `Question ${i}?` : PARAGRAPH.repeat(1 + (i % 5)) + (i % 7 === 1 ? CODE : ""),
);
const id = await imported("A long one", texts, {
  overflow: "drop_oldest",
  defaults: { max_tokens: TOKENS, ignore_eos: true, regex: PROSE },
});
const line = await paced();
await visit({ viewport: { width: 1360, height: 860 } }, async (page) => {
  const opening = Date.now();
  await page.goto(`${line.url}/s/${id}`);
  await composer(page).waitFor();
  await page.locator(`.row[data-index="${TURNS - 1}"]`).waitFor();
  const opened = Date.now() - opening;
  assert.ok((await page.locator(".row").count()) < 60, "all turns are drawn at once");
  // To the first turn, by a jump, and back.
  const log = page.getByRole("log");
  await log.focus();
  await page.keyboard.press("Home");
  await page.locator('.row[data-index="0"]').waitFor();
  // The jumps are the page's own: the browser does nothing for a key that a script strikes.
  for (const [key, row] of [
    ["End", TURNS - 1],
    ["Home", 0],
  ]) {
    await log.dispatchEvent("keydown", { key });
    await page.locator(`.row[data-index="${row}"]`).waitFor();
  }
  await page.getByRole("button", { name: "To the end" }).click();
  await page.locator(`.row[data-index="${TURNS - 1}"]`).waitFor();

  await say(page, "Go on.");
  await writing(page, 200); // what comes with sending it is no part of what is measured
  const browser = page.context().browser();
  await browser.startTracing(page, { categories: ["devtools.timeline", "toplevel"] });
  // While it is written: at the end, then scrolling through what was said, then at the end again.
  const distance = () => log.evaluate((at) => at.scrollHeight - at.scrollTop - at.clientHeight);
  await writing(page, 1500);
  assert.ok((await distance()) < 90, "the page does not follow what is written");
  await page.mouse.move(600, 400);
  for (let i = 0; i < 12; i++) {
    await page.mouse.wheel(0, -300);
    await page.waitForTimeout(50);
  }
  const before = await log.evaluate((at) => at.scrollTop);
  await page.waitForTimeout(500);
  const after = await log.evaluate((at) => at.scrollTop);
  assert.ok(Math.abs(after - before) < 2, "what one reads moves while something is written below");
  await shot(page, "long");
  await page.getByRole("button", { name: "To the end" }).click();
  await ended(page);
  const trace = JSON.parse((await browser.stopTracing()).toString());
  const tasks = mainThreadTasks(trace, "tdur");
  assertSame(await shown(page), (await stored(id)).text);
  const at = (share) => tasks[Math.floor(share * (tasks.length - 1))];
  const told = {
    opened_ms: opened,
    tasks: tasks.length,
    p99_ms: at(0.99),
    longest_ms: at(1),
    longest_wall_ms: mainThreadTasks(trace, "dur").at(-1),
  };
  assert.ok(tasks.length > 100, JSON.stringify(told));
  assert.ok(at(1) <= MAX_FRAME_MS, JSON.stringify(told));
  report(told);
});
line.close();
