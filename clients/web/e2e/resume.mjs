/** Answers survive what happens to the page and to the server: a reload, a lost connection, and
 * kill -9 of the engine (HEADWATER_ENGINE is its process id), each in the middle of an answer. */

import assert from "node:assert/strict";
import { connect, createServer } from "node:net";
import { assertQuiet, report, shot, url, visit } from "./browser.mjs";
import {
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

/** A line to the server that can be cut: what is open breaks, and what is new is refused. */
async function proxy() {
  const sockets = new Set();
  let whole = true;
  const server = createServer((near) => {
    if (!whole) return near.resetAndDestroy();
    const far = connect(Number(new URL(url).port), "127.0.0.1");
    for (const [from, to] of [
      [near, far],
      [far, near],
    ]) {
      sockets.add(from);
      from.on("error", () => undefined);
      from.on("close", () => to.destroy());
      from.pipe(to);
    }
    return undefined;
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    cut() {
      whole = false;
      for (const socket of sockets) socket.resetAndDestroy();
      sockets.clear();
    },
    mend: () => (whole = true),
    close() {
      for (const socket of sockets) socket.destroy();
      server.close();
    },
  };
}

/** Long enough for all that happens meanwhile; the answers are stopped once it has happened. */
const LENGTH = 3000;

await visit({ viewport: { width: 1360, height: 860 } }, async (page, seen) => {
  /** Stop the answer; what is shown is what the server has. Returns it. */
  const stop = async (id) => {
    await page.getByRole("button", { name: "Stop" }).click();
    await ended(page);
    const turn = await stored(id);
    assert.equal(turn.status, "interrupted");
    assertSame(await shown(page), turn.text);
    return turn;
  };

  // Reload.
  const reloaded = await session(LENGTH, "Reloaded");
  await open(page, reloaded);
  await say(page, "Tell me the story of a river, from its spring to the sea.");
  await writing(page, 80);
  const before = await shown(page);
  await page.reload();
  await writing(page, before.length + 100); // what was there is there, and more
  assert.equal((await stored(reloaded)).status, "running");
  const one = await stop(reloaded);
  assert.ok(one.text.startsWith(before.trim()));

  // Reload while an answer is being continued: its own beginning is not lost.
  await page.getByRole("button", { name: "Continue" }).click();
  await writing(page, one.text.length + 40);
  await page.reload();
  await writing(page, one.text.length + 80);
  const two = await stop(reloaded);
  assert.ok(two.text.startsWith(one.text) && two.num_tokens > one.num_tokens);

  // Two windows: what one begins, the other follows, and can stop.
  const shared = await session(LENGTH, "Two windows");
  await open(page, shared);
  const other = await page.context().newPage();
  await open(other, shared);
  await say(other, "Tell me the story of a sea.");
  await writing(other, 30);
  await page.bringToFront();
  await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
  await writing(page, 60);
  await stop(shared);
  await ended(other);
  assert.equal(await shown(other), await shown(page));
  await other.close();

  // The connection is lost and comes back.
  const lost = await session(LENGTH, "Lost");
  const line = await proxy();
  await page.goto(`${line.url}/s/${lost}`);
  await composer(page).waitFor();
  await say(page, "Tell me the story of a lake.");
  await writing(page, 80);
  line.cut();
  await page.getByText(/The connection is lost/).waitFor();
  const cut = await shown(page);
  await shot(page, "lost");
  line.mend();
  await writing(page, cut.length + 100);
  await stop(lost);
  line.close();
  assert.deepEqual(
    seen.outside.filter((address) => !address.startsWith(line.url)),
    [],
  );
  seen.outside.length = 0;

  // The engine dies.
  const killed = await session(LENGTH, "Killed");
  await open(page, killed);
  await say(page, "Tell me the story of a glacier.");
  await writing(page, 80);
  process.kill(Number(process.env.HEADWATER_ENGINE), "SIGKILL");
  await page.getByText(/Paused: the engine is being restarted/).waitFor();
  const paused = await shown(page);
  await shot(page, "paused");
  await writing(page, paused.length + 100);
  await page.getByText(/Paused: the engine is being restarted/).waitFor({ state: "detached" });
  await stop(killed);
  assertQuiet(seen);
});
report({});
