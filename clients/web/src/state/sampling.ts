/** The parameters that can be set for a session: their names, bounds and what they do. */

import type { Sampling } from "../api/types";

export interface Parameter {
  name: Exclude<keyof Sampling, "stop">;
  label: string;
  what: string;
  min: number;
  max: number;
  step: number;
}

/** Bounds as the server has them (docs/api.md). */
export const PARAMETERS: readonly Parameter[] = [
  {
    name: "temperature",
    label: "Temperature",
    what: "0 takes the likeliest token after the penalties",
    min: 0,
    max: 2,
    step: 0.05,
  },
  {
    name: "top_p",
    label: "Top p",
    what: "the likeliest tokens that make up this share",
    min: 0.01,
    max: 1,
    step: 0.01,
  },
  {
    name: "top_k",
    label: "Top k",
    what: "so many of the likeliest tokens; 0 is all",
    min: 0,
    max: 1000,
    step: 1,
  },
  {
    name: "min_p",
    label: "Min p",
    what: "at least this share of the likeliest one's",
    min: 0,
    max: 1,
    step: 0.01,
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    what: "above 1 avoids what was said",
    min: 0.01,
    max: 10,
    step: 0.05,
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    what: "once for each token that was said",
    min: -2,
    max: 2,
    step: 0.1,
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    what: "for each time that it was said",
    min: -2,
    max: 2,
    step: 0.1,
  },
  {
    name: "max_tokens",
    label: "Most tokens",
    what: "an answer's limit; else all the room",
    min: 1,
    max: 1_000_000,
    step: 1,
  },
  {
    name: "seed",
    label: "Seed",
    what: "the same seed draws the same answer",
    min: 0,
    max: 2 ** 53 - 1,
    step: 1,
  },
];

/** What the fields of the form say; raises Error with words for people. */
export function samplingOf(fields: Readonly<Record<string, string>>): Sampling {
  const sampling: Sampling = {};
  for (const { name, label, min, max, step } of PARAMETERS) {
    const said = (fields[name] ?? "").trim();
    if (said === "") continue;
    const value = Number(said);
    if (!Number.isFinite(value) || value < min || value > max) {
      throw new Error(`${label} is a number from ${min} to ${max}, or empty; not “${said}”.`);
    }
    if (step === 1 && !Number.isInteger(value)) {
      throw new Error(`${label} is a whole number; not “${said}”.`);
    }
    sampling[name] = value;
  }
  const stop = (fields["stop"] ?? "").split("\n").filter((line) => line !== "");
  if (stop.length > 16) throw new Error("There are at most 16 stop texts.");
  if (stop.length > 0) sampling.stop = stop;
  return sampling;
}

export function fieldsOf(sampling: Sampling): Record<string, string> {
  const fields: Record<string, string> = { stop: (sampling.stop ?? []).join("\n") };
  for (const { name } of PARAMETERS) fields[name] = sampling[name]?.toString() ?? "";
  return fields;
}
