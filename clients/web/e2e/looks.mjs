/** The page by keyboard only, on a phone, in the dark, enlarged, and while the server is full or
 * the context is; each audited. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";
import {
  api,
  composer,
  ended,
  imported,
  open,
  say,
  session,
  shown,
  stored,
  writing,
} from "./talk.mjs";

const MARKDOWN = `# A heading

A paragraph with **bold**, *italic*, \`code\` and a [link](https://example.org/path).

1. one
2. two

- [x] done
- [ ] not done

> A quotation.

| name | length |
|---|---|
| Rhine | 1,233 km |

\`\`\`python
def bend(river: str) -> int:
    """How often."""
    return len(river) * 2  # roughly
\`\`\`

![a picture](https://example.org/x.png)`;

const wide = { width: 1360, height: 860 };
const rich = await imported("Imported", ["Show me all that you can set.", MARKDOWN]);

await visit({ viewport: wide }, async (page, seen) => {
  // By keyboard only: say something, stop it, edit it, find the session again.
  const id = await session(300, "By keyboard");
  await open(page, id);
  assert.equal(await page.evaluate(() => document.activeElement.id), "composer");
  await page.keyboard.type("Count to ten.");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("Slowly.");
  await page.keyboard.press("Enter");
  await writing(page);
  await page.keyboard.press("Escape");
  await ended(page);
  assert.equal((await stored(id)).status, "interrupted");
  await page.keyboard.press("ArrowUp");
  await page.waitForFunction(
    () => document.activeElement.tagName === "TEXTAREA" && document.activeElement.id !== "composer",
  );
  await page.keyboard.type(" Please.");
  await page.keyboard.press("Enter");
  await page.locator(".said", { hasText: "Please." }).waitFor();
  await writing(page);
  await page.keyboard.press("Escape");
  await ended(page);
  assert.match(await page.locator(".said").textContent(), /Count to ten\.\nSlowly\. Please\./);
  await page.keyboard.press("Control+B");
  await page.locator(".sidebar").waitFor({ state: "detached" });
  await page.keyboard.press("Control+K");
  await page.waitForFunction(() => document.activeElement.id === "search");
  await page.keyboard.type("keyboard");
  await page.waitForFunction(() => document.querySelectorAll(".session").length === 1);
  await page.keyboard.press("Control+Shift+O");
  await page.waitForFunction(() => document.activeElement.id === "composer");
  // Everything that can be reached shows where one is, and nothing holds the focus.
  const stops = new Set();
  for (let i = 0; i < 60; i++) {
    await page.keyboard.press("Tab");
    const [where, visible] = await page.evaluate(() => {
      const at = document.activeElement;
      const style = getComputedStyle(at);
      return [
        `${at.tagName} ${at.getAttribute("aria-label") ?? at.textContent.slice(0, 30)}`,
        at === document.body || style.outlineStyle !== "none",
      ];
    });
    assert.ok(visible, `no focus to be seen on ${where}`);
    stops.add(where);
  }
  assert.ok(stops.size > 10, [...stops].join("; "));

  // What a model may set, in both themes.
  await open(page, rich);
  await page.locator(".hljs-keyword").first().waitFor();
  await shot(page, "rich-light");
  await audit(page, "rich text, light");
  const link = page.getByRole("link", { name: /^link/ });
  assert.equal(await link.getAttribute("rel"), "noopener noreferrer nofollow");
  assert.match(await link.textContent(), /example\.org/);
  await page.emulateMedia({ colorScheme: "dark" });
  await shot(page, "rich-dark");
  await audit(page, "rich text, dark");
  await page.goto(url);
  await page.locator(".starter").first().waitFor();
  await shot(page, "first-dark");
  await audit(page, "the first screen, dark");
  await page.getByLabel("Theme").selectOption("light");
  assert.equal(
    await page.evaluate(() => getComputedStyle(document.body).backgroundColor),
    "rgb(251, 249, 244)",
  );
  await page.getByLabel("Theme").selectOption("system");

  // The context is nearly full: said before it is. Then it is full: said by the server, in words.
  const { data } = await api("GET", "/v1/models");
  const full = await imported("Full", ["Hello", "word ".repeat(data[0].max_model_len - 200)]);
  await open(page, full);
  await page.getByText(/tokens are left/).waitFor();
  await shot(page, "full");
  await audit(page, "a full context");
  await say(page, "and more ".repeat(100));
  await page.getByRole("alert").getByText("The context is full.").waitFor();
  await page.getByRole("button", { name: "Edit", exact: true }).click();
  await page.getByRole("alert").waitFor({ state: "detached" });

  // The server refuses for now: said with the reason, tried again by itself.
  const busy = await session(8, "Busy");
  await open(page, busy);
  let refusals = 0;
  await page.route("**/turns", async (route) => {
    if (refusals++ > 0) return route.continue();
    const error = {
      message: "64 requests wait already",
      type: "overloaded_error",
      code: "queue_full",
    };
    return route.fulfill({ status: 503, headers: { "retry-after": "1" }, json: { error } });
  });
  await say(page, "Hello?");
  await page.getByRole("alert").getByText("The server is full.").waitFor();
  await shot(page, "refused");
  await audit(page, "a refusal");
  await ended(page);
  assert.equal(refusals, 2);
  assert.equal((await api("GET", `/v1/sessions/${busy}`)).turns.length, 2);
  assert.ok((await shown(page)).length > 0);
  await page.unroute("**/turns");
  assertQuiet(seen);
});

await visit(
  { viewport: { width: 390, height: 800 }, hasTouch: true, isMobile: true },
  async (page, seen) => {
    await page.goto(url);
    await page.locator(".starter").first().waitFor();
    await shot(page, "phone-first");
    await open(page, rich);
    await page.locator(".prose").first().waitFor();
    await shot(page, "phone");
    await audit(page, "a phone");
    await page.getByRole("button", { name: "Show the list" }).tap();
    await page.locator(".sidebar").waitFor();
    const { width } = await page.locator(".main").boundingBox();
    assert.equal(width, 390); // the list lies over the page, and pushes nothing aside
    await shot(page, "phone-list");
    await audit(page, "the list on a phone");
    await page.keyboard.press("Escape");
    await page.locator(".sidebar").waitFor({ state: "detached" });
    await page.getByRole("button", { name: "Show the list" }).tap();
    await page.getByRole("link", { name: "By keyboard" }).tap();
    await page.locator(".sidebar").waitFor({ state: "detached" });
    await composer(page).waitFor();
    assertQuiet(seen);
  },
);

// 320 px wide is 1280 px enlarged to 400 %: nothing is cut off, nothing needs scrolling sideways.
await visit({ viewport: { width: 320, height: 640 } }, async (page, seen) => {
  await open(page, rich);
  await page.locator(".prose").first().waitFor();
  const wider = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  assert.equal(wider, false);
  await shot(page, "enlarged");
  assertQuiet(seen);
});
report({});
