// The live graph: nodes on an ellipse, in an order that keeps neighbours near each other.

import { attr, draw, hideTip, make, say, showTip, sync } from "./dom.js";
import { GLYPHS, colour, condition, duration, mood, number, percent, plural, rate, size } from "./format.js";

const KINDS = {
  ok: "exchanging",
  slow: "steps wait for it",
  "one-sided": "only one end has it",
  ahead: "one end is ahead",
  behind: "one end is behind",
  suspect: "suspect",
  refused: "refused",
  gone: "gone",
};
const TROUBLED = (state) => state !== "ok";
const MOST_EDGES = 1500;
const LABELS_UNTIL = 64;

export class Graph {
  constructor(parent, note, legend, choose) {
    this.note = note;
    this.legend = legend;
    this.choose = choose;
    this.edges = draw("g", { class: "edges" });
    this.weights = draw("g", { class: "weights", "aria-hidden": "true" });
    this.nodes = draw("g", { class: "nodes" });
    this.svg = draw("svg", { role: "group", "aria-label": "Nodes and their edges" }, this.edges, this.weights, this.nodes);
    parent.append(this.svg);
    this.order = [];
    this.size = { width: 600, height: 420 };
    this.last = null;
    new ResizeObserver(([entry]) => {
      this.size = { width: entry.contentRect.width, height: entry.contentRect.height };
      if (this.last) this.show(...this.last);
    }).observe(parent);
    this.svg.addEventListener("keydown", (event) => this.#walk(event));
    this.svg.addEventListener("pointerleave", () => this.#leave());
  }

  show(run, selected) {
    this.last = [run, selected];
    const { width, height } = this.size;
    attr(this.svg, "viewBox", `0 0 ${width} ${height}`);
    const { nodes, links } = run;
    const places = this.#places(nodes, links);
    const index = new Map(nodes.map((node, at) => [node.key, at]));
    const shown = links.filter(
      (link) => links.length <= MOST_EDGES || TROUBLED(link.state) || link.a === selected || link.b === selected,
    );
    const radius = radiusFor(nodes.length);
    this.#drawEdges(shown, places, nodes.length);
    this.#drawNodes(nodes, places, index, radius, selected);
    this.#say(run, shown);
  }

  #places(nodes, links) {
    const keys = nodes.map((node) => node.key);
    const around = neighbours(keys, links);
    const same = this.order.length === keys.length && this.order.every((key) => around.has(key));
    const kept = this.order.filter((key) => around.has(key));
    const begun = [...kept, ...keys.filter((key) => !kept.includes(key))];
    const best = arranged(keys, around);
    // Nodes stay where they are unless another order is clearly better.
    if (!same || spread(best, around) < 0.8 * spread(begun, around)) this.order = best;
    const { width, height } = this.size;
    const count = this.order.length;
    const outside = count > 12 && count <= LABELS_UNTIL;
    const margin = { x: outside ? Math.min(96, width / 4.5) : Math.min(70, width / 6), y: outside ? Math.min(84, height / 5) : 46 };
    const ry = Math.max(height / 2 - margin.y, 20);
    const rx = Math.max(Math.min(width / 2 - margin.x, ry * (outside ? 1.35 : 1.9)), 20);
    const start = -Math.PI / 2 - (count % 2 ? 0 : Math.PI / count);
    return new Map(
      this.order.map((key, at) => {
        const angle = count === 2 ? Math.PI * (1 - at) : start + (2 * Math.PI * at) / count;
        const shrink = count === 1 ? 0 : count === 2 ? 0.62 : 1;
        return [key, {
          x: width / 2 + rx * shrink * Math.cos(angle),
          y: height / 2 - (count <= 12 ? 8 : 0) + ry * shrink * Math.sin(angle),
          angle, at, outside,
        }];
      }),
    );
  }

  #drawEdges(links, places, count) {
    const centre = { x: this.size.width / 2, y: this.size.height / 2 };
    const path = (link) => {
      const [a, b] = [places.get(link.a), places.get(link.b)];
      if (count <= 8) return `M${a.x.toFixed(1)} ${a.y.toFixed(1)}L${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
      const apart = Math.abs(a.at - b.at);
      const far = Math.min(apart, count - apart) / (count / 2);
      const bend = 0.12 + 0.4 * far * (1 - 0.6 * far);
      const [mx, my] = [(a.x + b.x) / 2, (a.y + b.y) / 2];
      const [cx, cy] = [mx + (centre.x - mx) * bend, my + (centre.y - my) * bend];
      return `M${a.x.toFixed(1)} ${a.y.toFixed(1)}Q${cx.toFixed(1)} ${cy.toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
    };
    const crowd = count > 30 ? 0.6 : 1;
    sync(
      this.edges, links.filter((link) => places.has(link.a) && places.has(link.b)), (link) => `${link.a}\n${link.b}`,
      () => draw("g", {}, draw("path", { class: "hit" }), draw("path", { class: "line" }), draw("path", { class: "flow" })),
      (group, link) => {
        const moving = link.state === "ok" || link.state === "slow";
        attr(group, "class", `edge ${link.state}${moving && link.rate > 0 && count <= 12 ? " moving" : ""}`);
        const d = path(link);
        for (const child of group.children) attr(child, "d", d);
        const weight = Math.max(link.weights[0] ?? 0, link.weights[1] ?? 0);
        const width = TROUBLED(link.state) && !moving ? 1.6 : crowd * (1 + 6 * weight);
        attr(group.children[1], "stroke-width", width.toFixed(2));
        group.onpointermove = (event) => showTip(event.clientX, event.clientY, ...edgeTip(link));
        group.onpointerleave = hideTip;
        group.dataset.ends = JSON.stringify([link.a, link.b]);
      },
    );
    const labelled = count <= 8 ? links.filter((link) => link.weights.some((weight) => weight > 0)) : [];
    sync(
      this.weights, labelled, (link) => `${link.a}\n${link.b}`, () => draw("text", {}),
      (text, link) => {
        const [a, b] = [places.get(link.a), places.get(link.b)];
        const beside = [1, count - 1].includes(Math.abs(a.at - b.at));
        const along = beside || count < 4 ? 0.5 : 0.32;
        attr(text, "x", (a.x + (b.x - a.x) * along).toFixed(1));
        attr(text, "y", (a.y + (b.y - a.y) * along + 4).toFixed(1));
        say(text, weightsOf(link));
      },
    );
  }

  #drawNodes(nodes, places, index, radius, selected) {
    const count = nodes.length;
    const focus = nodes.some((node) => node.key === selected) ? selected : nodes[0]?.key;
    sync(
      this.nodes, nodes, (node) => node.key,
      () => draw("g", { role: "button" },
        draw("circle", { class: "halo" }), draw("circle", { class: "disc" }),
        draw("circle", { class: "track" }), draw("circle", { class: "arc", pathLength: 100 }),
        draw("text", { class: "glyph", "aria-hidden": "true" }), draw("text", { class: "name", "aria-hidden": "true" })),
      (group, node) => {
        const place = places.get(node.key);
        const look = mood(node);
        const [halo, disc, track, arc, glyph, name] = group.children;
        attr(group, "class", `node ${look} ${node.state}${node.key === selected ? " selected" : ""}`);
        attr(group, "tabindex", node.key === focus ? 0 : -1);
        attr(group, "aria-label", `${node.node}: ${condition(node)}${node.steps_total ? `, ${percent(node.steps_done / node.steps_total)} done, loss ${number(node.loss || null)}` : ""}`);
        attr(group, "aria-pressed", node.key === selected);
        group.style.transform = `translate(${place.x.toFixed(1)}px, ${place.y.toFixed(1)}px)`;
        group.style.setProperty("--own", colour(index.get(node.key), count));
        attr(halo, "r", radius + 7);
        attr(disc, "r", Math.max(radius - (radius > 8 ? 5 : 0), 3));
        attr(track, "r", radius);
        attr(arc, "r", radius);
        const share = node.steps_total ? node.steps_done / node.steps_total : 0;
        attr(arc, "stroke-dasharray", `${(100 * share).toFixed(1)} 100`);
        say(glyph, radius > 8 ? (node.state === "finished" ? "✓" : GLYPHS[look]) : "");
        const wide = Math.cos(place.angle);
        if (count <= 12) {
          attr(name, "x", 0);
          attr(name, "y", radius + 19);
          attr(name, "text-anchor", "middle");
          name.removeAttribute("transform");
        } else {
          // Along the radius, so that names of a crowd do not lie over each other.
          const left = wide < -1e-9;
          attr(name, "x", left ? -(radius + 7) : radius + 7);
          attr(name, "y", 4);
          attr(name, "text-anchor", left ? "end" : "start");
          attr(name, "transform", `rotate(${((place.angle * 180) / Math.PI + (left ? 180 : 0)).toFixed(1)})`);
        }
        const wanted = count <= LABELS_UNTIL || node.key === selected || look === "bad";
        const room = count <= 12 ? 18 : 12;
        say(name, wanted ? (node.node.length > room ? `${node.node.slice(0, room - 1)}…` : node.node) : "");
        group.onclick = () => this.choose(node.key, group);
        group.onpointermove = (event) => {
          this.#point(node.key);
          showTip(event.clientX, event.clientY, ...nodeTip(node));
        };
        group.onpointerleave = () => this.#leave();
        group.onfocus = () => this.#point(node.key);
        group.onblur = () => this.#leave();
      },
    );
  }

  #point(key) {
    this.svg.classList.add("pointed");
    for (const edge of this.edges.children) {
      edge.classList.toggle("near", JSON.parse(edge.dataset.ends).includes(key));
    }
  }

  #leave() {
    this.svg.classList.remove("pointed");
    hideTip();
  }

  #walk(event) {
    const group = event.target.closest?.(".node");
    if (!group) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      group.onclick();
    } else if (step) {
      event.preventDefault();
      const at = this.order.indexOf(group.dataset.key);
      const next = this.order[(at + step + this.order.length) % this.order.length];
      const target = [...this.nodes.children].find((child) => child.dataset.key === next);
      for (const child of this.nodes.children) attr(child, "tabindex", child === target ? 0 : -1);
      target?.focus();
    }
  }

  #say(run, shown) {
    const edges = run.links.filter((link) => ["ok", "slow", "one-sided"].includes(link.state)).length;
    const hidden = run.links.length + run.links_left_out - shown.length;
    const kind = run.nodes.find((node) => node.topology)?.topology?.replaceAll("_", "–") ?? "";
    say(this.note, `${kind ? `${kind}, ` : ""}${plural(edges, "edge")}${hidden ? `; ${hidden} not drawn, choose a node to see its own` : ""}`);
    const kinds = [...new Set(["ok", ...run.links.map((link) => link.state)])];
    sync(
      this.legend, kinds, (kind) => kind,
      () => make("li", {}, make("i", { "aria-hidden": "true" }), make("span")),
      (item, kind) => {
        attr(item, "class", kind);
        say(item.children[1], kind === "ok" ? "exchanging, thicker with more weight" : KINDS[kind]);
      },
    );
  }
}

const radiusFor = (count) => (count <= 6 ? 24 : count <= 12 ? 20 : count <= 30 ? 12 : count <= 64 ? 9 : 4.5);

const weightsOf = ({ weights: [a, b] }) => {
  const said = [a, b].filter((weight) => weight !== null).map((weight) => weight.toFixed(2));
  return said[0] === said[1] || said.length < 2 ? said[0] : said.join(" / ");
};

function neighbours(keys, links) {
  const around = new Map(keys.map((key) => [key, new Set()]));
  for (const { a, b } of links) {
    around.get(a)?.add(b);
    around.get(b)?.add(a);
  }
  return around;
}

// How long the edges are, in places on the circle.
function spread(order, around) {
  const at = new Map(order.map((key, place) => [key, place]));
  let total = 0;
  for (const [key, others] of around) {
    for (const other of others) {
      const apart = Math.abs(at.get(key) - at.get(other));
      total += Math.min(apart, order.length - apart);
    }
  }
  return total || 1;
}

// A chain or ring is walked along; else nodes move to the middle of their neighbours while that helps.
function arranged(keys, around) {
  const degrees = [...around.values()].map((others) => others.size);
  if (keys.length > 3 && Math.max(...degrees) <= 2) {
    const order = [];
    const ends = keys.filter((key) => around.get(key).size <= 1);
    for (const begin of [...ends, ...keys]) {
      for (let key = begin; key && !order.includes(key); ) {
        order.push(key);
        key = [...around.get(key)].filter((other) => !order.includes(other)).sort((a, b) => keys.indexOf(a) - keys.indexOf(b))[0];
      }
    }
    return order;
  }
  let best = keys;
  let least = spread(keys, around);
  let order = keys;
  for (let pass = 0; pass < 40 && keys.length <= 128; pass += 1) {
    const angle = new Map(order.map((key, at) => [key, (2 * Math.PI * at) / order.length]));
    const pull = new Map(order.map((key) => {
      let [x, y] = [Math.cos(angle.get(key)), Math.sin(angle.get(key))];
      for (const other of around.get(key)) {
        x += 0.8 * Math.cos(angle.get(other));
        y += 0.8 * Math.sin(angle.get(other));
      }
      return [key, Math.atan2(y, x)];
    }));
    order = [...order].sort((a, b) => pull.get(a) - pull.get(b) || keys.indexOf(a) - keys.indexOf(b));
    const found = spread(order, around);
    if (found < least - 1e-9) [best, least] = [order, found];
  }
  return least < 0.9 * spread(keys, around) ? best : keys;
}

function rows(...pairs) {
  const list = make("dl");
  for (const [term, value] of pairs) {
    if (value !== null) list.append(make("dt", { text: term }), make("dd", { text: value }));
  }
  return list;
}

const nameOf = (key) => key.slice(key.indexOf("/") + 1);

function edgeTip(link) {
  return [
    make("strong", { text: `${nameOf(link.a)} – ${nameOf(link.b)}` }),
    rows(
      ["state", KINDS[link.state]],
      ["weight", link.weights.some((weight) => weight > 0) ? weightsOf(link) : null],
      ["rate", link.rate ? rate(link.rate) : null],
      ["exchanged", link.bytes ? size(link.bytes) : null],
      ["seen", `${duration(link.seen)} ago`],
      ["waited", `${duration(link.waited)}${link.waiting >= 0.01 ? `, ${percent(link.waiting)} of now` : ""}`],
      ["refused", link.refusals ? String(link.refusals) : null],
      ["retries", link.retries ? String(link.retries) : null],
      ["", link.detail || null],
    ),
  ];
}

function nodeTip(node) {
  return [
    make("strong", { text: node.node }),
    rows(
      ["state", condition(node)],
      ["done", node.steps_total ? percent(node.steps_done / node.steps_total) : null],
      ["loss", node.loss ? number(node.loss) : null],
      ["disagreement", node.loss ? number(node.disagreement) : null],
      ["own weight", node.degree ? number(node.own_weight) : null],
      ["waits for", node.waiting_for || null],
      ["warnings", node.warnings?.length ? String(node.warnings.length) : null],
    ),
  ];
}
