/** A model that says what it should not: nothing of it runs, loads, or becomes more than text. */

import assert from "node:assert/strict";
import { assertQuiet, audit, report, shot, url, visit } from "./browser.mjs";
import { payloads } from "./payloads.mjs";

const TAGS = new Set(
  (
    "P A SPAN CODE PRE EM STRONG DEL UL OL LI TABLE THEAD TBODY TR TH TD H3 H4 H5 H6 BLOCKQUOTE " +
    "HR BR DIV SUP SECTION BUTTON SVG PATH FIGURE FIGCAPTION"
  ).split(" "),
);

assert(payloads.length >= 100, `only ${payloads.length} payloads`);

async function api(method, path, body) {
  const answer = await fetch(url + path, {
    method,
    headers: { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!answer.ok) throw new Error(`${method} ${path}: ${answer.status} ${await answer.text()}`);
  return answer.status === 204 ? null : answer.json();
}

/** A session in which each answer, and each question, is one of the payloads. */
function transcript(title, texts) {
  const turns = texts.flatMap((text, i) =>
    ["user", "assistant"].map((role, j) => ({
      id: `t${2 * i + j}`,
      parent: i + j === 0 ? null : `t${2 * i + j - 1}`,
      role,
      content: [{ type: "text", text }],
      tokenizer: "of another model",
      created_at: 1_700_000_000 + i,
    })),
  );
  const session = { title, instructions: texts[0], head: turns.at(-1).id, created_at: 1_700_000_000 };
  return { format: "headwater.session", version: 1, session, turns };
}

/** What is wrong with the elements that are drawn of what was said. Runs in the page. */
function faultsOf(tags) {
  const faults = [];
  for (const node of document.querySelectorAll(".transcript .prose *")) {
    const said = node.outerHTML.slice(0, 200);
    if (!tags.includes(node.tagName.toUpperCase())) faults.push(`<${node.tagName}>: ${said}`);
    for (const { name, value } of node.attributes) {
      const drawn = node.closest("button, svg") !== null;
      if (/^on|^(src|srcset|srcdoc|action|formaction|ping|background|xlink:href)$/.test(name)) {
        faults.push(`${name}: ${said}`);
      }
      if (name === "style" && /url|fixed|absolute/.test(value)) faults.push(`style: ${said}`);
      if (name === "id" && !drawn && !value.startsWith("user-content-")) faults.push(`id: ${said}`);
      if (name === "href" && !/^(https?|mailto):/.test(value)) faults.push(`href: ${said}`);
    }
    if (node.tagName === "A") {
      const rel = node.rel.split(" ");
      if (!["noopener", "noreferrer", "nofollow"].every((word) => rel.includes(word))) {
        faults.push(`rel: ${said}`);
      }
      const host = node.protocol === "mailto:" ? "" : node.host;
      if (!node.textContent.includes(host)) faults.push(`the host is not said: ${said}`);
    }
  }
  if (document.querySelector("iframe, object, embed, base, img, video, audio, meta[http-equiv]")) {
    faults.push("an element that loads something");
  }
  return faults;
}

const made = [];
try {
  const session = await api("POST", "/v1/sessions/import", transcript(payloads[30], payloads));
  made.push(session.id);
  for (const title of payloads.filter((_, i) => i % 12 === 0)) {
    made.push((await api("POST", "/v1/sessions", { title: title.slice(0, 200) })).id);
  }
  await visit({ viewport: { width: 1200, height: 900 } }, async (page, seen) => {
    await page.addInitScript(() => {
      window.pwned = [];
      window.pwn = (what) => window.pwned.push(what);
    });
    await page.goto(`${url}/s/${session.id}`);
    await page.locator(".row").first().waitFor();
    await page.locator(".transcript").evaluate((node) => node.scrollTo(0, 0));
    await page.locator('.row[data-index="0"]').waitFor();

    const drawn = new Set();
    let faults = [];
    let stuck = 0;
    while (stuck < 5) {
      const rows = await page.locator(".row").evaluateAll((nodes) =>
        nodes.map((node) => Number(node.dataset.index)),
      );
      const before = drawn.size;
      rows.forEach((index) => drawn.add(index));
      faults = faults.concat(await page.evaluate(faultsOf, [...TAGS]));
      const end = await page.locator(".transcript").evaluate((node) => {
        node.scrollBy(0, 0.8 * node.clientHeight);
        return node.scrollTop + node.clientHeight >= node.scrollHeight - 1;
      });
      await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => done(null))));
      stuck = drawn.size === before && end ? stuck + 1 : 0;
    }
    assert.deepEqual(faults, []);
    assert.equal(drawn.size, 2 * payloads.length, "not all turns were drawn");
    await shot(page, "xss");

    // What a mouse would set off.
    for (const link of await page.locator(".transcript .prose a").all()) await link.hover();
    await audit(page, "a session of payloads");
    assert.deepEqual(await page.evaluate(() => window.pwned), []);
    assertQuiet(seen);
  });

  // The same from a model: forced by a grammar, streamed, then looked at token by token.
  const forced = (await api("POST", "/v1/sessions", { title: "forced" })).id;
  made.push(forced);
  const said = "<img src=x onerror=pwn(1)> [x](javascript:pwn(1)) <script>pwn(1)</script>";
  await visit({}, async (page, seen) => {
    await page.addInitScript(() => {
      window.pwned = [];
      window.pwn = (what) => window.pwned.push(what);
    });
    await page.goto(`${url}/s/${forced}`);
    await page.locator("#composer").waitFor();
    const answer = await api("POST", `/v1/sessions/${forced}/turns`, {
      input: said,
      regex: said.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"),
      max_tokens: 200,
    });
    assert.equal(answer.content[0].text, said);
    await page.reload();
    await page.locator(".turn-answer .prose").waitFor();
    assert.deepEqual(await page.evaluate(faultsOf, [...TAGS]), []);
    await page.goto(`${url}/s/${forced}?turn=${answer.id}`);
    await page.getByRole("listbox", { name: "Tokens" }).getByRole("option").nth(5).click();
    assert.equal(await page.locator("main img, main iframe, main script").count(), 0);
    assert.deepEqual(await page.evaluate(() => window.pwned), []);
    assertQuiet(seen);
  });
  report({ payloads: payloads.length });
} finally {
  for (const id of made) await api("DELETE", `/v1/sessions/${id}`);
}
