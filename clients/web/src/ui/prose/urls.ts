/** Addresses that a model wrote. */

const SCHEMES = new Set(["http:", "https:", "mailto:"]);

/** The address if it leads to the web or to mail, else "". Relative ones lead to this server, which
 * no model has any business with. */
export function safeUrl(url: string): string {
  try {
    const parsed = new URL(url);
    return SCHEMES.has(parsed.protocol) ? parsed.href : "";
  } catch {
    return "";
  }
}

/** Where a link leads, in words. */
export function hostOf(url: string): string {
  try {
    const parsed = new URL(url);
    return parsed.protocol === "mailto:" ? parsed.pathname : parsed.host;
  } catch {
    return "";
  }
}
