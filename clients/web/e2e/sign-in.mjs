/** Signing in by key: once, kept over a reload, out of reach of scripts, over when one leaves. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";

const key = process.env.HEADWATER_API_KEY;

await visit({}, async (page, seen, context) => {
  await page.goto(url);
  const field = page.getByLabel("API key");
  await field.waitFor();
  await audit(page, "the sign-in");
  await shot(page, "sign-in");

  await field.fill(`${key}x`);
  await page.keyboard.press("Enter");
  await page.getByRole("alert").waitFor();
  await audit(page, "the sign-in after a wrong key");

  await field.fill(key);
  await page.keyboard.press("Enter");
  await page.locator("#composer").waitFor();
  const [cookie, ...others] = await context.cookies();
  assert.deepEqual(others, []);
  assert.equal(cookie.httpOnly, true);
  assert.equal(cookie.sameSite, "Strict");
  const kept = await page.evaluate(() => [
    document.cookie,
    JSON.stringify({ ...localStorage }),
    JSON.stringify({ ...sessionStorage }),
    document.documentElement.outerHTML,
  ]);
  for (const text of [...kept, cookie.value]) assert(!text.includes(key), "the key is kept");
  assert.equal(kept[0], "");

  // What changes something, too. Short answers leave room for another one.
  await page.getByRole("button", { name: "System prompt and parameters" }).click();
  await page.getByLabel("Most tokens").fill("16");
  await page.getByRole("button", { name: "Save" }).click();
  await page.locator("#composer").fill("Why do rivers bend?");
  await page.keyboard.press("Enter");
  await page.locator(".turn-answer .prose").first().waitFor();
  await page.waitForURL(/\/s\/sess_/);

  await page.reload();
  await page.locator("#composer").waitFor();
  assert.equal(await field.count(), 0, "it asks again after a reload");

  // The sign-in ends while one writes: the words are there once one has signed in again.
  const composer = page.locator("#composer");
  await page.locator("[aria-label=Send]").waitFor();
  await context.clearCookies();
  await composer.fill("And why do lakes not?");
  // The count of what is written may be what is refused first.
  await Promise.race([composer.press("Enter").catch(() => undefined), field.waitFor()]);
  await field.fill(key);
  await page.keyboard.press("Enter");
  await composer.waitFor();
  await page.waitForFunction(
    () => document.getElementById("composer").value === "And why do lakes not?",
  );
  await composer.press("Enter");
  await page.locator(".turn-answer").nth(1).waitFor();
  await page.locator("[aria-label=Send]").waitFor();

  // Who signs out leaves no words behind.
  await composer.fill("Half a thought");
  await page.evaluate(() => localStorage.setItem("headwater.draft", '{"instructions":"Mine."}'));
  const [fresh] = await context.cookies();
  await page.getByRole("button", { name: "Sign out" }).click();
  await field.waitFor();
  const left = await page.evaluate(() => Object.keys(localStorage));
  assert.deepEqual(left.filter((name) => /words|draft/.test(name)), []);
  assert.deepEqual(await context.cookies(), []);
  await context.addCookies([fresh]); // a copy of it, from before
  await page.reload();
  await field.waitFor();
  assertQuiet(seen);
});
report({});
