import { useEffect, useState, type ReactNode } from "react";
import { CopyButton } from "../CopyButton";

/** Code is coloured once it has been still for so long. */
const STILL_MS = 150;

export function Code({ text, language }: { text: string; language: string }) {
  const coloured = useColoured(text, language);
  return (
    <figure className="code">
      <figcaption>
        <span>{language || "text"}</span>
        <CopyButton text={text} label="Copy code" />
      </figcaption>
      <pre tabIndex={0} aria-label={`Code, ${language || "text"}`}>
        <code>{coloured ?? text}</code>
      </pre>
    </figure>
  );
}

function useColoured(text: string, language: string): ReactNode {
  const [done, setDone] = useState<{ text: string; nodes: ReactNode } | null>(null);
  useEffect(() => {
    if (language === "") return undefined;
    let current = true;
    const timer = setTimeout(() => {
      void import("./colour").then(({ colour }) => {
        if (current) setDone({ text, nodes: colour(text, language) });
      });
    }, STILL_MS);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [text, language]);
  return done?.text === text ? done.nodes : null;
}
