import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./ui/App";
import { applyTheme, keptTheme } from "./ui/kept";
import "./ui/theme.css";
import "./ui/base.css";
import "./ui/prose/prose.css";
import "./ui/turns/turns.css";
import "./ui/sidebar.css";
import "./ui/first.css";
import "./ui/dialogs.css";
import "./ui/chat.css";

applyTheme(keptTheme());

const root = document.getElementById("root");
if (root === null) throw new Error("index.html has no #root");
createRoot(root).render(
  <StrictMode>
    <App />
  </StrictMode>,
);
