/// <reference types="vitest/config" />
import { fileURLToPath } from "node:url";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// `npm run dev` and `vite preview` take the API from a running server.
const server = process.env["HEADWATER_URL"] ?? "http://127.0.0.1:8000";
const proxy = Object.fromEntries(
  ["/v1", "/tokenize", "/detokenize", "/ready", "/version", "/metrics"].map((path) => [
    path,
    // The server refuses what another origin asks for.
    { target: server, changeOrigin: true, headers: { origin: server } },
  ]),
);

export default defineConfig({
  plugins: [react()],
  resolve: {
    alias: {
      // Its build for browsers lets the browser read entities out of HTML, which the policy forbids.
      "decode-named-character-reference": fileURLToPath(
        new URL("node_modules/decode-named-character-reference/index.js", import.meta.url),
      ),
    },
  },
  // The content security policy allows no `data:` scripts or fonts; small files stay files.
  build: {
    outDir: "../../server/pages/web", // what the server, the wheel and the image take
    emptyOutDir: true,
    chunkSizeWarningLimit: 700, // kB, not gzipped; the budget is 350 kB gzipped
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy },
  preview: { proxy },
  test: { include: ["src/**/*.test.ts"] },
});
