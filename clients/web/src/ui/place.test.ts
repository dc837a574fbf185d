import { expect, test } from "vitest";
import { addressOf, placeOf, type Place } from "./place";

const SESSION = "sess_0123456789abcdef0123456789abcdef";

test.each<[string, Place]>([
  ["/", { session: null, view: "text" }],
  ["/?view=kv", { session: null, view: "kv" }],
  [`/s/${SESSION}`, { session: SESSION, view: "text" }],
  [`/s/${SESSION}?view=cache`, { session: SESSION, view: "cache" }],
  [`/s/${SESSION}?turn=turn_1`, { session: SESSION, view: { turn: "turn_1" } }],
])("%s", (address, place) => {
  expect(placeOf(new URL(address, "http://h"))).toEqual(place);
  expect(addressOf(place)).toBe(address);
});

test.each(["/s/", "/s/../v1", "/other", "/s/sess_x?turn=a"])(
  "%s is the first screen",
  (address) => {
    expect(placeOf(new URL(address, "http://h"))).toEqual({ session: null, view: "text" });
  },
);
