// The block schedule: a row a round, a column a block, and where each node is.

import { attr, make, say, sync } from "./dom.js";
import { COLOURS, number, plural } from "./format.js";

const ROUNDS_SHOWN = 6;

export class Strip {
  constructor(parent, note) {
    this.note = note;
    this.heat = make("div", { class: "row heat" });
    this.rows = make("div", { class: "rows" });
    this.scale = make("div", { class: "row scale", "aria-hidden": "true" });
    parent.append(this.rows, this.heat, this.scale);
  }

  show(nodes) {
    const known = nodes.filter((node) => node.steps_total);
    const blocks = Math.max(0, ...known.map((node) => node.blocks));
    const rounds = Math.max(0, ...known.map((node) => node.rounds));
    if (!blocks || blocks > 1024) {
      say(this.note, "nothing planned yet");
      return;
    }
    const active = known.filter((node) => ["live", "stale"].includes(node.state));
    const at = Math.min(rounds - 1, Math.max(0, ...(active.length ? active : known).map((node) => node.round)));
    const begin = Math.max(0, Math.min(at - ROUNDS_SHOWN + 2, rounds - ROUNDS_SHOWN));
    const visible = Array.from({ length: Math.min(ROUNDS_SHOWN, rounds) }, (_, row) => begin + row);
    say(this.note, `${plural(rounds, "round")} of ${plural(blocks, "block")}, ${plural(known[0].steps_per_visit, "step")} a visit` +
      (rounds > ROUNDS_SHOWN ? `; rounds ${begin + 1} to ${begin + visible.length} shown` : ""));
    const index = new Map(nodes.map((node, place) => [node.key, place]));
    for (const row of [this.rows, this.heat, this.scale]) row.style.setProperty("--blocks", blocks);
    const columns = Array.from({ length: blocks }, (_, block) => block);
    sync(this.rows, visible, (round) => round, () => make("div", { class: "row" }, make("b"), make("div", { class: "cells" })), (row, round) => {
      say(row.firstElementChild, String(round + 1));
      attr(row.firstElementChild, "aria-label", `round ${round + 1}`);
      sync(row.lastElementChild, columns, (block) => block, () => make("div", { class: "cell" }, make("i"), make("span")), (cell, block) => {
        const here = active.filter((node) => node.round === round && node.block === block && node.steps_done < node.steps_total);
        const done = known.filter((node) => isDone(node, round, block)).length;
        cell.firstElementChild.style.setProperty("--share", (done / known.length).toFixed(3));
        attr(cell, "class", `cell${done === known.length ? " done" : ""}${here.length ? " here" : ""}`);
        const label = `round ${round + 1}, block ${block}: ${here.length ? `${here.map((node) => node.node).slice(0, 12).join(", ")} here; ` : ""}done by ${done} of ${known.length}`;
        attr(cell, "title", label);
        const dots = nodes.length <= COLOURS ? here : [];
        sync(cell.lastElementChild, dots, (node) => node.key, () => make("em"), (dot, node) => {
          dot.style.background = `var(--n${index.get(node.key)})`;
        });
        attr(cell.lastElementChild, "data-count", nodes.length > COLOURS && here.length ? here.length : "");
      });
    });
    this.#heat(known, columns);
    const every = Math.max(1, Math.ceil(blocks / 16));
    sync(this.scale, [0], () => 0, () => make("div", { class: "cells" }), (cells) => {
      sync(cells, columns, (block) => block, () => make("small"), (mark, block) => say(mark, block % every ? "" : String(block)));
    });
    if (this.scale.children.length === 1) this.scale.prepend(make("b", { text: "block" }));
  }

  // How far apart the nodes were at each block's last step: the worst of them, on a log scale.
  #heat(known, columns) {
    const worst = columns.map((block) => Math.max(0, ...known.map((node) => node.block_disagreement?.[block] ?? 0)));
    const some = worst.filter((value) => value > 0);
    this.heat.hidden = !some.length;
    if (!some.length) return;
    const [low, high] = [Math.log(Math.min(...some)), Math.log(Math.max(...some))];
    if (!this.heat.children.length) this.heat.append(make("b", { text: "‖Δ‖", title: "disagreement at the block's last step, the largest of the nodes" }), make("div", { class: "cells" }));
    sync(this.heat.lastElementChild, columns, (block) => block, () => make("div", { class: "bar" }, make("i")), (bar, block) => {
      const value = worst[block];
      const share = value > 0 ? 0.15 + 0.85 * (high > low ? (Math.log(value) - low) / (high - low) : 1) : 0;
      bar.firstElementChild.style.setProperty("--share", share.toFixed(3));
      attr(bar, "title", `block ${block}: last disagreement ${value > 0 ? number(value) : "unknown"}`);
    });
  }
}

function isDone(node, round, block) {
  if (node.steps_done >= node.steps_total || round < node.round) return true;
  if (round > node.round) return false;
  const order = node.round_order ?? [];
  const place = order.length ? order.indexOf(block) : block;
  return place >= 0 && place < node.position;
}
