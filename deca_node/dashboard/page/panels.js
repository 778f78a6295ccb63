// Everything on the page that is words and tables.

import { $, attr, make, say, sync } from "./dom.js";
import { GLYPHS, clock, colour, condition, duration, mood, number, percent, phase, plural, position, rate, size } from "./format.js";

const EVENTS_SHOWN = 200;
const TOGETHER_SECONDS = 20;

// --- overview

export function tiles(run) {
  const { summary, nodes } = run;
  const front = nodes.filter((node) => node.steps_total).sort((a, b) => b.steps_done - a.steps_done)[0];
  const over = front && front.steps_done >= front.steps_total;
  const missing = Math.max(summary.wanted, summary.nodes) - summary.live;
  const ended = (summary.states.finished ?? 0) + (summary.states.stopped ?? 0);
  const all = [
    { name: "Nodes", value: String(summary.live), unit: `of ${Math.max(summary.wanted, summary.nodes)}`, note: ended ? `${ended} have ended` : missing > 0 ? `${missing} missing` : "all here", look: missing > ended ? "warn" : "" },
    { name: "Position", value: front ? `round ${Math.min(front.round + 1, front.rounds)}` : "–", unit: front ? `of ${front.rounds}` : "", note: front ? (over ? "all steps done" : `block ${front.block} · step ${Math.min(front.step + 1, front.steps_per_visit)} of ${front.steps_per_visit}`) : "nothing planned yet" },
    { name: "Time left", value: summary.eta_seconds ? duration(summary.eta_seconds) : "–", unit: "", note: summary.progress === null ? "" : `${percent(summary.progress)} of all steps` },
    { name: "Loss", value: number(summary.loss), unit: "", note: "median of the nodes" },
    { name: "Disagreement", value: number(summary.disagreement), unit: "", note: "median of the nodes" },
    { name: "Sent", value: size(summary.bytes_sent).split(" ")[0], unit: size(summary.bytes_sent).split(" ")[1], note: `now ${rate(summary.rate)}` },
  ];
  sync($("tiles"), all, (tile) => tile.name,
    () => make("div", { class: "tile" }, make("h2"), make("p", { class: "value" }, make("span"), make("small")), make("p", { class: "note" })),
    (tile, { name, value, unit, note, look }) => {
      const [head, line, under] = tile.children;
      say(head, name);
      say(line.children[0], value);
      say(line.children[1], unit);
      say(under, note);
      attr(tile, "class", `tile ${look ?? ""}`);
    });
}

export function header(state, run, operates) {
  say($("run-name"), run ? run.run : "");
  document.title = run ? `${run.run} · ${run.summary.live} of ${run.summary.nodes} nodes · deca-node` : "deca-node";
  $("run-choice").hidden = state.runs.length < 2;
  sync($("run"), state.runs, (each) => each.run, (each) => make("option", { value: each.run, text: each.run }), () => {});
  if (run) $("run").value = run.run;
  const phases = run ? Object.entries(run.summary.phases).sort((a, b) => b[1] - a[1]) : [];
  sync($("phases"), phases, ([name]) => name, () => make("span", { class: "pill" }), (pill, [name, count]) => {
    say(pill, phases.length > 1 ? `${phase(name)} ${count}` : phase(name));
    attr(pill, "class", `pill ${name}`);
  });
  const share = run?.summary.progress ?? 0;
  $("progress").firstElementChild.style.width = `${(100 * share).toFixed(2)}%`;
  attr($("progress"), "aria-valuenow", Math.round(100 * share));
  say($("footer"), `deca-node ${state.version} · watching ${state.given.join(", ")} · every ${state.interval} s · ${operates ? "this page tells nodes what to do" : "this page changes nothing"}`);
}

export function empty(state) {
  const box = $("empty");
  const none = !state.runs.length;
  box.hidden = !none;
  document.body.classList.toggle("nothing", none);
  if (!none) return;
  const lines = state.silent.map(({ address, error }) => make("li", {}, make("code", { text: address }), error ? ` ${error.replace(`${address}: `, "")}` : " asking…"));
  const where = state.silent.length === 1 ? `No node answers at ${state.silent[0].address}` : "No node answers";
  const told = state.silent.length ? make("ul", {}, ...lines) : make("p", { text: `Watching ${state.given.join(", ")}: none runs now.` });
  box.replaceChildren(
    make("h2", { text: where }),
    make("p", { text: "Is it running? This page keeps looking and shows it as soon as it answers." }),
    told,
    make("p", {}, "Start a node with ", make("code", { text: "deca-node start --config node.toml" }), ", and look at it with ", make("code", { text: "deca-node status" }), "."),
  );
}

export function warnings(run) {
  const found = run.summary.warnings;
  const gone = run.nodes.filter((node) => node.state === "gone" || node.state === "stale");
  $("warnings").hidden = !found.length && !gone.length;
  const all = [
    // The text counts seconds: the row stays.
    ...gone.map((node) => ({ key: `gone ${node.key}`, text: `has not answered for ${duration(node.age)}: check that it runs, and the network between (the others go on without it)`, nodes: [node.node], bad: node.state === "gone" })),
    ...found.map((warning) => ({ key: `warning ${warning.text}`, ...warning })),
  ];
  sync($("warning-list"), all, (warning) => warning.key,
    () => make("li", {}, make("i", { "aria-hidden": "true" }), make("b"), make("span")),
    (item, { text, nodes, bad }) => {
      attr(item, "class", bad ? "bad" : "warn");
      say(item.children[0], bad ? "✕" : "!");
      say(item.children[1], nodes.length > 3 ? `${nodes.slice(0, 3).join(", ")} and ${nodes.length - 3} more` : nodes.join(", "));
      say(item.children[2], text);
    });
}

// --- the table of nodes

const COLUMNS = [
  ["Node", (node) => node.node],
  ["State", (node) => mood(node)],
  ["Position", (node) => node.steps_done ?? -1],
  ["Loss", (node) => node.loss || Infinity],
  ["Disagreement", (node) => node.disagreement ?? Infinity],
  ["Edges", (node) => node.degree ?? -1],
  ["Sending", (node) => node.send_rate ?? -1],
  ["Memory", (node) => node.memory_bytes ?? -1],
  ["Left", (node) => node.eta_seconds ?? -1],
];

export class NodeTable {
  constructor(choose) {
    this.choose = choose;
    this.by = 0;
    this.down = false;
    COLUMNS.forEach(([name], at) => {
      const button = make("button", { text: name, onclick: () => this.#sort(at) });
      $("node-head").append(make("th", { scope: "col", class: at > 2 ? "number" : "" }, button));
    });
  }

  #sort(at) {
    this.down = this.by === at && !this.down;
    this.by = at;
    if (this.last) this.show(...this.last);
  }

  show(nodes, selected) {
    this.last = [nodes, selected];
    [...$("node-head").children].forEach((cell, at) => attr(cell, "aria-sort", at === this.by ? (this.down ? "descending" : "ascending") : "none"));
    const index = new Map(nodes.map((node, at) => [node.key, at]));
    const [, value] = COLUMNS[this.by];
    const sorted = this.by === 0 ? [...nodes] : [...nodes].sort((a, b) => (value(a) > value(b)) - (value(a) < value(b)));
    if (this.down) sorted.reverse();
    sync($("node-rows"), sorted, (node) => node.key, (node) => this.#row(node), (row, node) => {
      attr(row, "class", `${mood(node)} ${node.state}${node.key === selected ? " selected" : ""}`);
      const cells = row.children;
      const button = cells[0].firstElementChild;
      button.children[0].style.background = colour(index.get(node.key), nodes.length);
      say(button.children[1], node.node);
      attr(button, "aria-pressed", node.key === selected);
      const badge = cells[1].firstElementChild;
      attr(badge, "class", `badge ${mood(node)}`);
      say(badge.children[0], node.state === "finished" ? "✓" : GLYPHS[mood(node)]);
      say(badge.children[1], condition(node));
      say(cells[1].lastElementChild, node.state === "gone" || node.state === "stale" ? `${duration(node.age)} ago` : node.waiting_for ? `waits for ${node.waiting_for}` : node.warnings?.length ? plural(node.warnings.length, "warning") : "");
      say(cells[2].firstElementChild, position(node));
      const share = node.steps_total ? node.steps_done / node.steps_total : 0;
      cells[2].lastElementChild.firstElementChild.style.width = `${(100 * share).toFixed(1)}%`;
      say(cells[3], number(node.loss || null));
      say(cells[4], node.loss ? number(node.disagreement) : "–");
      say(cells[5], node.degree === undefined ? "–" : String(node.degree));
      say(cells[6], node.send_rate ? rate(node.send_rate) : "–");
      say(cells[7], node.memory_bytes ? size(node.memory_bytes) : "–");
      say(cells[8], node.eta_seconds ? duration(node.eta_seconds) : "–");
    });
  }

  #row(node) {
    const cell = (at, ...children) => make("td", { class: at > 2 ? "number" : "", "data-name": COLUMNS[at][0] }, ...children);
    const button = make("button", { class: "pick" }, make("i"), make("span"));
    button.addEventListener("click", () => this.choose(node.key, button));
    return make("tr", {},
      make("th", { scope: "row" }, button),
      cell(1, make("span", { class: "badge" }, make("i", { "aria-hidden": "true" }), make("span")), make("small")),
      cell(2, make("span"), make("div", { class: "meter", "aria-hidden": "true" }, make("i"))),
      ...[3, 4, 5, 6, 7, 8].map((at) => cell(at)));
  }
}

// --- events

// The same thing told by several nodes within a while is one line.
export function grouped(events) {
  const found = [];
  for (const event of [...events].sort((a, b) => b.at - a.at || b.id - a.id)) {
    const same = found.slice(-40).find((other) => other.peer === event.peer && other.kind === event.kind && (event.peer || other.text === event.text) && other.at - event.at < TOGETHER_SECONDS && !other.nodes.includes(event.node));
    if (same) same.nodes.push(event.node);
    else found.push({ ...event, nodes: [event.node] });
    if (found.length > EVENTS_SHOWN) break;
  }
  return found;
}

export function events(all, run, only, selected) {
  const name = selected ? selected.slice(selected.indexOf("/") + 1) : null;
  const own = all.filter((event) => event.key.startsWith(`${run.run}/`) && (!only || event.trouble || event.kind === "resolved" || event.kind === "answers") && (!selected || event.key === selected || event.peer === name));
  const list = $("event-list");
  sync(list, grouped(own), (event) => event.id,
    () => make("li", {}, make("time"), make("i", { "aria-hidden": "true" }), make("p", {}, make("b"), make("span"), make("small"))),
    (item, event) => {
      attr(item, "class", event.trouble ? "trouble" : event.kind.replaceAll(" ", "-"));
      say(item.children[0], clock(event.at));
      attr(item.children[0], "datetime", new Date(event.at * 1000).toISOString());
      const [who, what, by] = item.children[2].children;
      const { nodes } = event;
      const names = nodes.length > 3 ? `${nodes.slice(0, 2).join(", ")} and ${nodes.length - 2} more` : nodes.join(", ");
      say(who, event.peer || names);
      say(what, ` ${event.text}`);
      say(by, event.peer ? ` says ${names}` : "");
    });
  if (!list.children.length) list.append(make("li", { class: "none", "data-key": "none" }, make("p", { text: only ? "no trouble" : "nothing yet" })));
}

// --- data skew

export function skew(nodes) {
  const telling = nodes.filter((node) => node.label_counts && Object.keys(node.label_counts).length);
  $("skew").hidden = !telling.length;
  if (!telling.length) return;
  const labels = [...new Set(telling.flatMap((node) => Object.keys(node.label_counts)))].sort().slice(0, 64);
  // A label may be called anything, also "all" or "constructor".
  const columns = [{ key: "node", text: "" }, ...labels.map((label) => ({ key: `label ${label}`, text: label, label })), { key: "all", text: "all" }];
  sync($("skew-head"), columns, (column) => column.key, ({ key, text }) => make("th", { scope: "col", class: key === "node" ? "" : "number", text }), () => {});
  sync($("skew-rows"), telling, (node) => node.key, () => make("tr"), (row, node) => {
    const total = Object.values(node.label_counts).reduce((sum, count) => sum + count, 0);
    sync(row, columns, (column) => column.key, ({ key }) => make(key === "node" ? "th" : "td", { class: key === "node" ? "" : "number" }), (cell, { key, label }) => {
      if (key === "node") return say(cell, node.node);
      if (key === "all") return say(cell, String(total));
      const count = Object.hasOwn(node.label_counts, label) ? node.label_counts[label] : 0;
      say(cell, String(count));
      cell.style.setProperty("--share", (total ? count / total : 0).toFixed(3));
      attr(cell, "class", count ? "number heat" : "number heat none");
    });
  });
}

// --- one node

export function details(node, tree) {
  say($("details-title"), node.node);
  const facts = (pairs) => {
    const list = make("dl", { class: "facts" });
    for (const [name, value] of pairs) if (value) list.append(make("dt", { text: name }), make("dd", { text: value }));
    return list;
  };
  const parts = [
    make("p", {}, make("span", { class: `badge ${mood(node)}` }, make("i", { text: node.state === "finished" ? "✓" : GLYPHS[mood(node)] }), make("span", { text: condition(node) }))),
  ];
  if (node.state === "heard") {
    parts.push(make("p", { text: `Others name it at ${node.address}; this page has not reached it there.` }));
  } else {
    if (node.state !== "live") parts.push(make("p", { class: "note", text: `Last answer ${duration(node.age)} ago: ${node.error}` }));
    for (const text of node.warnings ?? []) parts.push(make("p", { class: "remedy", text }));
    parts.push(facts([
      ["position", position(node)],
      ["steps", `${node.steps_done} of ${node.steps_total}`],
      ["time left", node.eta_seconds ? duration(node.eta_seconds) : ""],
      ["waits for", node.waiting_for],
      ["caught up", node.catch_up_total ? `${size(node.catch_up_bytes)} of ${size(node.catch_up_total)}` : ""],
      ["loss", number(node.loss || null)],
      ["gradient norm", number(node.gradient_norm || null)],
      ["h norm", number(node.h_norm || null)],
      ["disagreement", node.loss ? number(node.disagreement) : ""],
      ["own weight", number(node.own_weight)],
      ["incomplete mixes", String(node.incomplete_mixes)],
      ["sent", `${size(node.bytes_sent)} · ${rate(node.send_rate)}`],
      ["received", `${size(node.bytes_received)} · ${rate(node.receive_rate)}`],
      ["memory", size(node.memory_bytes)],
      ["on the device", node.device_memory_bytes ? size(node.device_memory_bytes) : ""],
      ["device", node.device],
      ["model", node.model],
      ["method", node.method],
      ["address", node.address],
      ["process", tree ? `pid ${tree.pid}, up ${duration(node.uptime_seconds)}` : ""],
      ["version", node.version],
      ["refused", tree ? Object.entries(tree.refusals).map(([reason, count]) => `${reason} ${count}`).join(", ") : ""],
    ]));
  }
  if (tree?.peers?.length) {
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...["Peer", "State", "Weight", "Seen", "Waited", "Refused"].map((name, at) => make("th", { scope: "col", class: at > 1 ? "number" : "", text: name })))));
    for (const peer of tree.peers) {
      table.append(make("tr", { class: peer.neighbour ? "neighbour" : "" },
        make("th", { scope: "row", text: peer.node }),
        make("td", { text: peer.detail ? `${peer.state}: ${peer.detail}` : peer.state }),
        make("td", { class: "number", text: peer.neighbour ? number(peer.weight) : "–" }),
        make("td", { class: "number", text: duration(peer.last_seen_seconds) }),
        make("td", { class: "number", text: duration(peer.waited_seconds) }),
        make("td", { class: "number", text: Object.entries(peer.refusals).map(([reason, count]) => `${reason} ${count}`).join(", ") || "–" })));
    }
    parts.push(make("h3", { text: "What it knows of its peers" }), make("div", { class: "scroll" }, table));
  }
  $("details-body").replaceChildren(...parts);
}
