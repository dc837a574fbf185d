import "./microscope.css";
import "./tables.css";
import "./attention.css";
import "./norms.css";
import "./cache.css";

export { CacheView } from "./CacheView";
export { KvComparison } from "./KvComparison";
export { Microscope } from "./Microscope";
