/** What the scripts here share: a Chromium, a page, and notes of what must not happen on it. */

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

export const url = process.env.HEADWATER_URL ?? "http://127.0.0.1:8000";
const shots = process.env.HEADWATER_SHOTS;
const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");

/** Runs `use(page, seen, context)`. `seen` has the dialogs, the requests to other origins, the
 * errors of page and console, and the violations of the content security policy, so far. */
export async function visit(options, use) {
  const browser = await chromium.launch({
    executablePath: process.env.HEADWATER_CHROMIUM ?? "/usr/bin/chromium",
    // Inside a container there are no namespaces to make a sandbox of.
    args: ["--no-sandbox", "--disable-dev-shm-usage"],
  });
  try {
    const context = await browser.newContext({ reducedMotion: "reduce", ...options });
    context.setDefaultTimeout(20_000);
    const seen = { dialogs: [], outside: [], errors: [], violations: [] };
    await context.exposeFunction("noteViolation", (what) => seen.violations.push(what));
    await context.addInitScript(() => {
      addEventListener("securitypolicyviolation", (event) =>
        window.noteViolation(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`),
      );
    });
    // Not by a script element: the policy would not run it.
    await context.addInitScript({ path: axe });
    context.on("request", (request) => {
      const address = new URL(request.url());
      if (address.origin !== new URL(url).origin && !["data:", "blob:"].includes(address.protocol)) {
        seen.outside.push(request.url());
      }
    });
    context.on("page", (page) => watch(page, seen));
    const page = await context.newPage();
    try {
      await use(page, seen, context);
    } catch (error) {
      await shot(page, "failed");
      process.stderr.write(`at ${page.url()}, seen: ${JSON.stringify(seen, null, 1)}\n`);
      throw error;
    }
  } finally {
    await browser.close();
  }
}

function watch(page, seen) {
  page.on("dialog", (dialog) => {
    seen.dialogs.push(`${dialog.type()}: ${dialog.message()}`);
    void dialog.dismiss();
  });
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("console", (message) => {
    // Chromium says by itself of each answer that it was none: those the page deals with.
    const failed = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !failed) seen.errors.push(message.text());
  });
}

/** Fails if anything ran, was loaded from outside, was stopped by the policy, or broke. */
export function assertQuiet(seen) {
  assert.deepEqual(seen, { dialogs: [], outside: [], errors: [], violations: [] });
}

/** A PNG in the folder HEADWATER_SHOTS, for people to look at. */
export async function shot(page, name) {
  if (shots === undefined) return;
  await mkdir(shots, { recursive: true });
  await page.screenshot({ path: join(shots, `${name}.png`) });
}

/** Fails for what axe finds serious or critical on what is shown now. */
export async function audit(page, what) {
  const { violations } = await page.evaluate(() =>
    window.axe.run(document, {
      runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    }),
  );
  const grave = violations
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, help, nodes }) => ({ id, help, at: nodes.map((node) => node.html.slice(0, 200)) }));
  assert.deepEqual(grave, [], `axe on ${what}`);
}

/** What pytest gets: the last line of the output. */
export function report(value) {
  process.stdout.write(`\n${JSON.stringify(value)}\n`);
}
