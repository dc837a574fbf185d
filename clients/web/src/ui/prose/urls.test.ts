import { expect, test } from "vitest";
import { hostOf, safeUrl } from "./urls";

test.each([
  "javascript:alert(1)",
  " javascript:alert(1)",
  "java\nscript:alert(1)",
  "JaVaScRiPt:alert(1)",
  "data:text/html,<script>alert(1)</script>",
  "vbscript:x",
  "file:///etc/passwd",
  "blob:http://h/x",
  "//evil.example/x",
  "/v1/sessions",
  "#x",
  "",
])("%j leads nowhere", (url) => {
  expect(safeUrl(url)).toBe("");
});

test.each(["https://example.org/a?b#c", "http://example.org/", "mailto:sarah@example.org"])(
  "%s is a link",
  (url) => {
    expect(safeUrl(url)).toBe(url);
  },
);

test("the host is told as the browser understands it", () => {
  expect(hostOf("https://bank.example@evil.example/login")).toBe("evil.example");
  expect(hostOf("mailto:sarah@example.org")).toBe("sarah@example.org");
});
