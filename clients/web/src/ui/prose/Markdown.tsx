import { memo, useMemo, type ReactNode } from "react";
import ReactMarkdown, { type Components } from "react-markdown";
import remarkGfm from "remark-gfm";
import { blocksOf, definitionsShown } from "./blocks";
import { Code } from "./Code";
import { hostOf, safeUrl } from "./urls";

/** What a model says, which may be anything: no HTML of its own, no addresses but web and mail
 * ones, nothing that is loaded. */
export const Markdown = memo(function Markdown({ text }: { text: string }) {
  const blocks = useMemo(() => blocksOf(text), [text]);
  return (
    <div className="prose">
      {blocks.map((block, i) => (
        <Block key={i} text={block} />
      ))}
    </div>
  );
});

const PLUGINS = [remarkGfm];

const Block = memo(function Block({ text }: { text: string }) {
  return (
    <ReactMarkdown remarkPlugins={PLUGINS} urlTransform={safeUrl} components={COMPONENTS}>
      {definitionsShown(text)}
    </ReactMarkdown>
  );
});

const COMPONENTS: Components = {
  a: ({ href, children }) => <Link href={href}>{children}</Link>,
  img: ({ src, alt }) => (
    <Link href={typeof src === "string" ? src : undefined}>
      <span className="image-note">image, not loaded: {alt || "no description"}</span>
    </Link>
  ),
  pre: ({ node, children }) => {
    const code = node?.children[0];
    if (code?.type !== "element") return <pre>{children}</pre>;
    const name = code.properties["className"];
    const language = Array.isArray(name) ? String(name[0]).replace(/^language-/, "") : "";
    const inner = code.children[0];
    return <Code text={inner?.type === "text" ? inner.value : ""} language={language} />;
  },
  table: ({ children }) => (
    <div className="table-scroll" role="region" aria-label="Table" tabIndex={0}>
      <table>{children}</table>
    </div>
  ),
  h1: ({ children }) => <h3>{children}</h3>,
  h2: ({ children }) => <h3>{children}</h3>,
  h3: ({ children }) => <h4>{children}</h4>,
  h4: ({ children }) => <h5>{children}</h5>,
  h5: ({ children }) => <h6>{children}</h6>,
  input: ({ checked }) => <span>{checked ? "☑ " : "☐ "}</span>,
};

/** The host stands beside the words: a link cannot pretend to lead elsewhere. */
function Link({ href, children }: { href: string | undefined; children?: ReactNode }) {
  if (!href) return <span>{children}</span>;
  const host = hostOf(href);
  return (
    <a href={href} target="_blank" rel="noopener noreferrer nofollow">
      {children}
      {host !== "" && <span className="link-host">({host})</span>}
    </a>
  );
}
