// The page: one stream from the server, one state, everything drawn from it.

import { Chart } from "./chart.js";
import { $, attr, say } from "./dom.js";
import { duration } from "./format.js";
import { Graph } from "./graph.js";
import { Operate } from "./operate.js";
import { NodeTable, details, empty, events, header, skew, tiles, warnings } from "./panels.js";
import { Strip } from "./strip.js";

// Beyond this many points of one curve the whole is asked for again, thinned by the server.
const MOST_POINTS = 1500;
const MOST_EVENTS = 500;

let state = null;
let selected = null;
let chosenRun = null;
let onlyTrouble = false;
let opener = null;
let tree = null;
let source = null;
let heardAt = 0;
let log = [];
const series = new Map();

const graph = new Graph($("graph"), $("graph-note"), $("graph-legend"), choose);
const charts = [
  new Chart($("loss-card"), "loss", ["loss"], choose),
  new Chart($("second-card"), "second", ["disagreement", "gradient_norm", "h_norm", "seconds"], choose),
];
const strip = new Strip($("strip"), $("strip-note"));
const table = new NodeTable(choose);
const operate = new Operate($("operate"));

// --- the stream

function connect() {
  source?.close();
  source = new EventSource("/api/stream");
  source.onmessage = ({ data }) => take(JSON.parse(data));
}

function take(news) {
  heardAt = performance.now();
  if (news.whole) {
    series.clear();
    log = [];
  }
  state = news;
  log = [...log, ...news.events].slice(-MOST_EVENTS);
  for (const [key, points] of Object.entries(news.curves)) grow(key, points);
  document.body.classList.remove("loading");
  show();
  if ([...series.values()].some((points) => points.length > MOST_POINTS)) connect();
}

// A point that was still growing, or steps that are done again, take the place of what they overlap.
function grow(key, points) {
  const own = series.get(key) ?? [];
  series.set(key, own);
  for (const point of points) {
    while (own.length && own.at(-1)[1] >= point[0]) own.pop();
    own.push(point);
  }
}

// --- drawing

function current() {
  const runs = state.runs;
  return runs.find((run) => run.run === chosenRun) ?? runs.toSorted((a, b) => b.summary.live - a.summary.live)[0];
}

function show() {
  if (!state) return;
  const run = current();
  header(state, run, Boolean(operate.token));
  empty(state);
  connection();
  if (!run) return;
  if (selected && !run.nodes.some((node) => node.key === selected)) close();
  tiles(run);
  warnings(run);
  graph.show(run, selected);
  const planned = run.nodes.find((node) => node.steps_total);
  const perRound = planned ? planned.blocks * planned.steps_per_visit : 0;
  for (const chart of charts) chart.show(run.nodes.filter((node) => node.state !== "heard"), series, selected, perRound);
  strip.show(run.nodes);
  table.show(run.nodes, selected);
  events(log, run, onlyTrouble, selected);
  skew(run.nodes);
  if (selected) look();
}

function connection() {
  const age = (performance.now() - heardAt) / 1000;
  const open = source?.readyState === EventSource.OPEN;
  const stale = !heardAt || age > Math.max(8, 3 * (state?.interval ?? 1) + 5) || (!open && age > 3);
  document.body.classList.toggle("stale", Boolean(heardAt) && stale);
  attr($("live"), "class", stale ? "lost" : "");
  say($("live-text"), !heardAt ? "connecting" : stale ? `no news for ${duration(age)}` : "live");
}

// --- one node

function choose(key, from = null) {
  if (selected === key) return close();
  selected = key;
  tree = null;
  opener = from;
  $("details").hidden = false;
  show();
  $("details-title").focus({ preventScroll: true });
}

function close() {
  selected = null;
  tree = null;
  $("details").hidden = true;
  opener?.focus?.({ preventScroll: true });
  opener = null;
  show();
}

async function look() {
  const key = selected;
  const node = current()?.nodes.find((each) => each.key === key);
  if (!node) return;
  details(node, tree);
  operate.show(node);
  if (node.state === "heard") return;
  try {
    const answer = await fetch(`/api/node?key=${encodeURIComponent(key)}`);
    if (!answer.ok || key !== selected) return;
    tree = await answer.json();
    details(node, tree);
  } catch {
    // The stream's own state says that the server is away.
  }
}

// --- the rest

$("details-close").addEventListener("click", close);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && selected) close();
});
$("run").addEventListener("change", (event) => {
  chosenRun = event.target.value;
  close();
});
for (const [id, value] of [["events-all", false], ["events-trouble", true]]) {
  $(id).addEventListener("click", () => {
    onlyTrouble = value;
    attr($("events-all"), "aria-pressed", !value);
    attr($("events-trouble"), "aria-pressed", value);
    show();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
setInterval(connection, 1000);
document.addEventListener("visibilitychange", () => {
  // Browsers hold back what hidden pages do; begin anew with the whole.
  if (document.hidden) source?.close();
  else connect();
});
connect();
