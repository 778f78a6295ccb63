// Numbers, units and states as people read them; the same units as `deca-node status`.

export function size(count) {
  let left = count || 0;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(left) < 1024) return unit === "B" ? `${left.toFixed(0)} B` : `${left.toFixed(1)} ${unit}`;
    left /= 1024;
  }
  return `${left.toFixed(1)} TiB`;
}

export const rate = (perSecond) => `${size(perSecond)}/s`;

export function duration(seconds) {
  const whole = Math.round(seconds || 0);
  const two = (number) => String(number).padStart(2, "0");
  const [second, minute, hour] = [whole % 60, Math.floor(whole / 60) % 60, Math.floor(whole / 3600) % 24];
  const day = Math.floor(whole / 86400);
  if (day) return `${day}d ${two(hour)}h`;
  if (hour) return `${hour}h ${two(minute)}m`;
  return minute ? `${minute}m ${two(second)}s` : `${second}s`;
}

export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const far = Math.abs(value);
  if (far >= 1e5 || far < 1e-3) return value.toExponential(2).replace("e+", "e");
  return far >= 100 ? value.toFixed(1) : far >= 1 ? value.toFixed(3) : value.toPrecision(3);
}

export const percent = (share) => `${Math.floor(100 * share)}%`;

export const phase = (word) => String(word).replaceAll("_", " ");

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

// Of a node that was never asked: how it has left, as others tell.
const left = (node) => node.said === "finished" || node.said === "stopped";

// What is said of a node: its own phase while it answers, else what became of it.
export function condition(node) {
  switch (node.state) {
    case "live": return phase(node.phase);
    case "stale": return "not answering";
    case "heard": return left(node) ? node.said : `${node.said}, not asked`;
    default: return node.state;
  }
}

// good, busy, warn, bad or off: how a condition looks.
export function mood(node) {
  if (node.state === "gone") return "bad";
  if (node.state === "stale") return "warn";
  if (node.state === "heard") return node.said === "alive" || left(node) ? "off" : "warn";
  if (node.state === "finished") return "good";
  if (node.state === "stopped") return "off";
  if (node.warnings?.length) return "warn";
  return ["training", "serving", "done", "agreeing"].includes(node.phase) ? "good" : "busy";
}

export const GLYPHS = { bad: "✕", warn: "!", off: "–", busy: "…", good: "" };

export function position(node) {
  if (!node.steps_total) return "–";
  if (node.steps_done >= node.steps_total) return "all steps done";
  const step = Math.min(node.step + 1, node.steps_per_visit);
  return `round ${node.round + 1}/${node.rounds} · block ${node.block} · step ${step}/${node.steps_per_visit}`;
}

export function median(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  if (!sorted.length) return NaN;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Nodes have a colour of their own while colours can be told apart.
export const COLOURS = 8;
export const colour = (index, count) => (count <= COLOURS ? `var(--n${index})` : "var(--many)");
