/** The conversation as a request that can be sent from elsewhere: with curl, or from Python. */

import type { Sampling } from "../api/types";

export interface Message {
  role: string;
  content: string;
}

/** Not of the OpenAI wire; its client takes them in `extra_body`. */
const EXTRA = new Set(["top_k", "min_p", "repetition_penalty"]);

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
  const plain = entries.filter(([name]) => !EXTRA.has(name));
  const extra = Object.fromEntries(entries.filter(([name]) => EXTRA.has(name)));
  const fields = [
    `    model=${JSON.stringify(model)},`,
    "    messages=[",
    ...messages.map(
      ({ role, content }) =>
        `        {"role": ${JSON.stringify(role)}, "content": ${JSON.stringify(content)}},`,
    ),
    "    ],",
    ...plain.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`),
    ...(Object.keys(extra).length > 0 ? [`    extra_body=${JSON.stringify(extra)},`] : []),
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
