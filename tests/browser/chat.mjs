// The chat page in a real browser: starts the real server on a free port, sends a message, watches the reply come, keeps screenshots.
// usage: node chat.mjs CYRENE_BINARY MODEL_FOLDER SCREENSHOT_FOLDER

import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [binary, model, shots] = process.argv.slice(2);
assert(binary && model && shots, "usage: node chat.mjs CYRENE_BINARY MODEL_FOLDER SCREENSHOT_FOLDER");
mkdirSync(shots, { recursive: true });

const server = spawn(binary, ["serve", "--model", model, "--port", "0", "--name", "demo"], { stdio: ["ignore", "pipe", "inherit"] });
const url = await new Promise((resolve, reject) => {
  let printed = "";
  server.stdout.on("data", (chunk) => {
    printed += chunk;
    const found = printed.match(/http:\/\/\S+\/chat/);
    if (found) resolve(found[0]);
  });
  server.on("exit", (code) => reject(new Error(`the server ended with ${code}`)));
  setTimeout(() => reject(new Error("the server printed no address")), 60_000).unref();
});

const profile = mkdtempSync(join(tmpdir(), "cyrene-browser-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  viewport: { width: 1100, height: 760 },
  locale: "en-US",
});

let failed = false;
try {
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => assert(new URL(request.url()).host === new URL(url).host, `the page asked another host: ${request.url()}`));

  // 1. the page opens, says who it is and how small
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("#status-text")?.textContent?.trim().length > 0);
  await page.waitForFunction(async () => (await (await fetch("/health")).json()).status === "ok", null, { timeout: 60_000 });
  const note = await page.textContent("#note");
  assert.match(note, /million parameters/, `the note does not say the model's size: ${note}`);
  assert.match(await page.textContent("body"), /AI, unofficial/);
  const profiles = await page.$$eval("#profile option", (options) => options.map((option) => option.textContent));
  assert.deepEqual(profiles.map((text) => text.split(/[^A-Za-z]/)[0]), ["Suggested", "Legacy", "Adopted"]);
  assert.match(await page.$eval("#profile", (select) => select.selectedOptions[0].textContent), /^Adopted/);

  // 2. a message goes out with Enter, the reply streams in
  const before = (await page.textContent("#log")).length;
  await page.evaluate(() => {
    window.seen = [];
    const log = document.querySelector("#log");
    new MutationObserver(() => {
      const length = log.textContent.length;
      if (window.seen.at(-1) !== length) window.seen.push(length);
    }).observe(log, { childList: true, subtree: true, characterData: true });
  });
  const asked = page.waitForRequest((request) => request.url().endsWith("/v1/chat/completions"));
  await page.fill("#input", "Good evening. What shall we weigh today?");
  await page.press("#input", "Enter");
  await page.waitForSelector("#log > li.user");
  const roles = (await asked).postDataJSON().messages.map((message) => message.role);
  assert.deepEqual(roles, ["system", "assistant", "user"], "the greeting that the page shows is part of what the model reads");
  await page.waitForFunction(() => document.querySelector("#stop").hidden && !document.querySelector("#send").hidden, null, { timeout: 120_000 });
  const text = await page.textContent("#log");
  const grown = await page.evaluate(() => window.seen);
  const said = await page.textContent("#log > li.assistant:last-of-type .body");
  assert(said.trim().length > 3, `no reply: ${text}`);
  assert(text.length > before, text);
  assert(grown.length > 3, `the reply did not stream: ${grown}`);
  assert(!/<think>|<\|im_end\|>/.test(text), `marks leak into the reply: ${text}`);
  await page.screenshot({ path: join(shots, "chat.png") });

  // 3. another reply for the same turn, then undo
  const rounds = await page.$$eval("#log > li", (items) => items.length);
  await page.click("#swipe");
  await page.waitForFunction(() => document.querySelector("#stop").hidden, null, { timeout: 120_000 });
  assert.equal(await page.$$eval("#log > li", (items) => items.length), rounds, "a swipe adds no turn");
  await page.click("#undo");
  assert((await page.$$eval("#log > li", (items) => items.length)) < rounds, "undo takes turns back");

  // 4. a phone, and Chinese
  await page.setViewportSize({ width: 360, height: 700 });
  await page.click("#language");
  await page.fill("#input", "晚上好，旅人来了。");
  await page.press("#input", "Enter");
  await page.waitForFunction(() => document.querySelector("#stop").hidden && document.querySelectorAll("#log > li").length > 1, null, { timeout: 120_000 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
  assert(!wide, "the page scrolls sideways at 360 px");
  await page.screenshot({ path: join(shots, "chat-phone.png") });

  // 5. movie mode
  await page.setViewportSize({ width: 1100, height: 760 });
  await page.click("#movie");
  await page.waitForSelector("#stage:not([hidden])");
  await page.waitForTimeout(1500);
  await page.screenshot({ path: join(shots, "movie.png") });
  await page.keyboard.press("Escape");
  await page.waitForSelector("#stage", { state: "hidden" });

  // 6. the server goes away: the page says so
  server.kill("SIGINT");
  await page.waitForFunction(() => !document.querySelector("#retry").hidden, null, { timeout: 30_000 });
  await page.screenshot({ path: join(shots, "unreachable.png") });

  const real = complaints.filter((text) => !/ERR_CONNECTION_REFUSED|Failed to fetch|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET/.test(text));
  assert.deepEqual(real, [], "the page complained on its console");
  console.log("chat page: 6 passed, 0 failed");
} catch (error) {
  failed = true;
  console.error(error);
} finally {
  await context.close();
  server.kill("SIGKILL");
  rmSync(profile, { recursive: true, force: true });
}
process.exit(failed ? 1 : 0);
