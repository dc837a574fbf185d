import { whole } from "./words";

/** Said wherever a long text is looked at in part, as the numbers are those of the part. */
export function CutNote(props: { from: number; limit: number }) {
  if (props.from === 0) return null;
  return (
    <p className="ms-note">
      This reads {whole(props.limit)} tokens at a time: here the text begins at token{" "}
      {whole(props.from + 1)}, and what was before it plays no part.
    </p>
  );
}
