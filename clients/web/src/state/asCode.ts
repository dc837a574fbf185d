/** The conversation as a request that can be sent from elsewhere: with curl, or from Python. */

import type { Sampling } from "../api/types";

export interface Message {
  role: string;
  content: string;
}

/** What OpenAI's client has an argument for; the rest it takes in `extra_body`. */
const ARGUMENTS = new Set([
  "frequency_penalty",
  "logit_bias",
  "logprobs",
  "max_completion_tokens",
  "max_tokens",
  "n",
  "presence_penalty",
  "response_format",
  "seed",
  "stop",
  "temperature",
  "top_logprobs",
  "top_p",
]);

/** A JSON value as Python writes it. */
function python(value: unknown): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value).map(([name, of]) => `${python(name)}: ${python(of)}`);
  return `{${entries.join(", ")}}`;
}

export function asCurl(
  origin: string,
  model: string,
  messages: readonly Message[],
  sampling: Sampling,
  keyed: boolean,
): string {
  const body = JSON.stringify({ model, messages, ...sampling, stream: true }, null, 2);
  return [
    `curl -N ${origin}/v1/chat/completions \\`,
    ...(keyed ? [`  -H "Authorization: Bearer $HEADWATER_API_KEY" \\`] : []),
    `  -H 'Content-Type: application/json' \\`,
    `  -d '${body.replaceAll("'", `'\\''`)}'`,
  ].join("\n");
}

export function asPython(
  origin: string,
  model: string,
  messages: readonly Message[],
  sampling: Sampling,
  keyed: boolean,
): string {
  const entries = Object.entries(sampling);
  const plain = entries.filter(([name]) => ARGUMENTS.has(name));
  const extra = Object.fromEntries(entries.filter(([name]) => !ARGUMENTS.has(name)));
  const fields = [
    `    model=${python(model)},`,
    "    messages=[",
    ...messages.map(
      ({ role, content }) =>
        `        {"role": ${python(role)}, "content": ${python(content)}},`,
    ),
    "    ],",
    ...plain.map(([name, value]) => `    ${name}=${python(value)},`),
    ...(Object.keys(extra).length > 0 ? [`    extra_body=${python(extra)},`] : []),
    "    stream=True,",
  ];
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${keyed ? 'os.environ["HEADWATER_API_KEY"]' : '"none"'})`,
    "stream = client.chat.completions.create(",
    ...fields,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}
