import { execFileSync } from "node:child_process";
import { expect, test } from "vitest";
import { asCurl, asPython } from "./asCode";

const MESSAGES = [
  { role: "system", content: "Say 'it', \"it\" and \\n; $(reboot) `id`" },
  { role: "user", content: "Two\nlines — ☃" },
];
const SAMPLING = { temperature: 0.5, top_k: 40, stop: ["'"] };

test("a shell reads the command as the request that it is", () => {
  const command = asCurl("http://h:1", "m", MESSAGES, SAMPLING, true);
  const script = `curl() { printf '%s\\0' "$@"; }; HEADWATER_API_KEY=k; ${command}`;
  const [, url, , key, , type, , body] = execFileSync("bash", ["-c", script])
    .toString()
    .split("\0");
  expect([url, key, type]).toEqual([
    "http://h:1/v1/chat/completions",
    "Authorization: Bearer k",
    "Content-Type: application/json",
  ]);
  expect(JSON.parse(body ?? "")).toEqual({
    model: "m",
    messages: MESSAGES,
    ...SAMPLING,
    stream: true,
  });
});

test("without keys no header asks for one", () => {
  expect(asCurl("http://h", "m", MESSAGES, {}, false)).not.toContain("Authorization");
  expect(asPython("http://h", "m", MESSAGES, {}, false)).not.toContain("environ");
});

test("Python reads the call as the request that it is", () => {
  const format = { type: "json_schema", json_schema: { strict: true, schema: { a: null } } };
  const sampling = { ...SAMPLING, response_format: format, ignore_eos: false };
  const code = asPython("http://h:1", "m", MESSAGES, sampling, false);
  const program = [
    "import json, sys, types",
    "class OpenAI:",
    "    def __init__(self, **fields):",
    "        make = lambda **said: print(json.dumps({**fields, **said})) or []",
    "        self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=make))",
    "sys.modules['openai'] = types.SimpleNamespace(OpenAI=OpenAI)",
    code,
  ].join("\n");
  const said: unknown = JSON.parse(execFileSync("python3", ["-c", program]).toString());
  expect(said).toEqual({
    base_url: "http://h:1/v1",
    api_key: "none",
    model: "m",
    messages: MESSAGES,
    temperature: 0.5,
    stop: ["'"],
    response_format: format,
    extra_body: { top_k: 40, ignore_eos: false },
    stream: true,
  });
});
