import { expect, test } from "vitest";
import { fieldsOf, samplingOf } from "./sampling";

test("what the form shows is what it reads back", () => {
  const sampling = { temperature: 0, top_k: 40, seed: 7, max_tokens: 12, stop: ["END", "."] };
  expect(samplingOf(fieldsOf(sampling))).toEqual(sampling);
  expect(samplingOf(fieldsOf({}))).toEqual({});
});

test.each([
  ["temperature", "3", /Temperature is a number from 0 to 2/],
  ["temperature", "warm", /“warm”/],
  ["top_p", "0", /Top p/],
  ["seed", "1.5", /Seed is a whole number/],
])("%s %s is refused in words", (name, value, message) => {
  expect(() => samplingOf({ [name]: value })).toThrow(message);
});

test("stop texts are one a line, at most sixteen", () => {
  expect(samplingOf({ stop: "a\n\n b \n" })).toEqual({ stop: ["a", " b "] });
  expect(() => samplingOf({ stop: "x\n".repeat(17) })).toThrow(/16/);
});
