// A curve per node on a canvas: step along, a measure up, with a read-out under the pointer.

import { attr, hideTip, make, say, showTip, sync } from "./dom.js";
import { COLOURS, median, number } from "./format.js";

// Of a point as the server sends it: first and last step, then the measures.
export const MEASURES = {
  loss: { at: 2, title: "Loss", log: false, smooth: true },
  gradient_norm: { at: 3, title: "Gradient norm", log: false, smooth: true },
  h_norm: { at: 4, title: "h norm", log: false, smooth: false },
  disagreement: { at: 5, title: "Disagreement", log: true, smooth: true },
  seconds: { at: 6, title: "Seconds a step", log: false, smooth: true },
};
const LEFT = 54;
const RIGHT = 14;
const TOP = 12;
const BOTTOM = 26;
const SMOOTHING = 0.85;

export class Chart {
  constructor(card, id, measures, choose) {
    this.choose = choose;
    this.measure = measures[0];
    this.log = MEASURES[this.measure].log;
    this.smooth = MEASURES[this.measure].smooth;
    this.title = make("h2", { id: `${id}-title`, text: MEASURES[this.measure].title });
    this.logButton = make("button", { "aria-pressed": this.log, text: "Log", title: "Logarithmic scale", onclick: () => this.#toggle("log") });
    this.smoothButton = make("button", { "aria-pressed": this.smooth, text: "Smooth", title: "A running mean over the raw values", onclick: () => this.#toggle("smooth") });
    const select = make("select", { "aria-label": "Measure", onchange: () => this.#pick(select.value) },
      ...measures.map((name) => make("option", { value: name, text: MEASURES[name].title })));
    this.canvas = make("canvas", { tabindex: 0, role: "img" });
    this.box = make("div", { class: "plot" }, this.canvas);
    this.legend = make("ul", { class: "legend" });
    card.append(
      make("div", { class: "head" }, this.title,
        make("div", { class: "buttons" }, measures.length > 1 ? select : null, this.logButton, this.smoothButton)),
      this.box, this.legend,
    );
    this.pointer = null;
    this.data = { nodes: [], series: new Map(), selected: null, stepsPerRound: 0 };
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.canvas.addEventListener("pointermove", (event) => this.#hover(event.offsetX, event));
    this.canvas.addEventListener("pointerdown", (event) => this.#hover(event.offsetX, event));
    this.canvas.addEventListener("pointerleave", () => this.#leave());
    this.canvas.addEventListener("blur", () => this.#leave());
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  show(nodes, series, selected, stepsPerRound) {
    this.data = { nodes, series, selected, stepsPerRound };
    this.draw();
  }

  #toggle(what) {
    this[what] = !this[what];
    attr(this[`${what}Button`], "aria-pressed", this[what]);
    this.draw();
  }

  #pick(name) {
    this.measure = name;
    this.title.textContent = MEASURES[name].title;
    for (const what of ["log", "smooth"]) {
      this[what] = MEASURES[name][what];
      attr(this[`${what}Button`], "aria-pressed", this[what]);
    }
    this.draw();
  }

  // Step and value pairs of every node, smoothed where wanted.
  #lines() {
    const at = MEASURES[this.measure].at;
    const { nodes, series } = this.data;
    return nodes.map((node, index) => {
      const raw = [];
      for (const point of series.get(node.key) ?? []) {
        const value = point[at];
        if (value !== null && (!this.log || value > 0)) raw.push([point[1], value]);
      }
      return { node, index, raw, line: this.smooth && raw.length > 8 ? smoothed(raw, this.log) : raw };
    }).filter((line) => line.raw.length);
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.box;
    if (!width || !height) return;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const lines = this.#lines();
    const styles = getComputedStyle(this.box);
    const ink = (name) => styles.getPropertyValue(name).trim();
    context.font = `12px ${styles.fontFamily}`;
    const frame = this.#frame(lines, width, height);
    this.frame = frame;
    this.drawn = lines;
    this.#legend(lines);
    this.#describe(lines);
    if (!frame) {
      context.fillStyle = ink("--soft");
      context.textAlign = "center";
      context.fillText("no step yet", width / 2, height / 2);
      return;
    }
    this.#axes(context, frame, ink, width, height);
    const many = this.data.nodes.length > COLOURS;
    const { selected } = this.data;
    context.lineJoin = "round";
    context.save();
    context.beginPath();
    context.rect(LEFT - 1, TOP - 2, width - LEFT - RIGHT + 3, height - TOP - BOTTOM + 4);
    context.clip();
    const trace = (points, style, thick, alpha) => {
      context.strokeStyle = style;
      context.lineWidth = thick;
      context.globalAlpha = alpha;
      context.beginPath();
      let begun = false;
      for (const [step, value] of points) {
        const [x, y] = [frame.x(step), frame.y(value)];
        if (begun) context.lineTo(x, y);
        else context.moveTo(x, y);
        begun = true;
      }
      context.stroke();
    };
    for (const { node, index, raw, line } of lines) {
      const style = many ? ink("--many-line") : ink(`--n${index}`);
      const dim = selected && node.key !== selected;
      if (!many && line !== raw) trace(raw, style, 1, dim ? 0.08 : 0.25);
      if (many) trace(line, style, 1, selected ? 0.16 : Math.max(0.12, 0.6 - lines.length / 120));
      else trace(line, style, node.key === selected ? 2.6 : 1.8, dim ? 0.35 : 1);
      if (line.length === 1) dot(context, frame.x(line[0][0]), frame.y(line[0][1]), style, 3);
    }
    if (many) trace(medians(lines, frame), ink("--accent"), 2.2, 1);
    const chosen = many && lines.find(({ node }) => node.key === selected);
    if (chosen) {
      trace(chosen.raw, ink("--chosen"), 1, 0.3);
      trace(chosen.line, ink("--chosen"), 2.4, 1);
    }
    context.restore();
    context.globalAlpha = 1;
    if (this.pointer !== null) this.#crosshair(context, frame, ink, many, height);
  }

  #frame(lines, width, height) {
    let [low, high, first, last] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { line, raw } of lines) {
      for (const [, value] of this.data.nodes.length > COLOURS ? line : raw) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
      first = Math.min(first, raw[0][0]);
      last = Math.max(last, raw.at(-1)[0]);
    }
    if (low > high) return null;
    if (last - first < 1) last = first + 1;
    const scale = this.log ? Math.log10 : (value) => value;
    let [bottom, top] = [scale(low), scale(high)];
    const pad = Math.max((top - bottom) * 0.06, this.log ? 0.05 : Math.abs(top) * 0.02, 1e-9);
    bottom = !this.log && low >= 0 && bottom - pad < (top - bottom) * 0.3 ? 0 : bottom - pad;
    top += pad;
    const [w, h] = [width - LEFT - RIGHT, height - TOP - BOTTOM];
    return {
      first, last, bottom, top,
      x: (step) => LEFT + (w * (step - first)) / (last - first),
      y: (value) => TOP + h * (1 - (scale(value) - bottom) / (top - bottom)),
      step: (x) => first + ((x - LEFT) / w) * (last - first),
    };
  }

  #axes(context, frame, ink, width, height) {
    context.lineWidth = 1;
    context.fillStyle = ink("--soft");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const value of this.log ? decades(frame.bottom, frame.top) : nice(frame.bottom, frame.top, 5)) {
      const y = Math.round(frame.y(value)) + 0.5;
      if (y < TOP - 1 || y > height - BOTTOM + 1) continue;
      context.strokeStyle = ink("--grid");
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(width - RIGHT, y);
      context.stroke();
      context.fillText(short(value), LEFT - 8, y);
    }
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    for (const step of nice(frame.first, frame.last, Math.max(2, Math.floor(width / 110)))) {
      if (step % 1 === 0) context.fillText(String(step), frame.x(step), height - 8);
    }
    const round = this.data.stepsPerRound;
    if (!round || (frame.last - frame.first) / round > 24) return;
    context.setLineDash([2, 4]);
    for (let step = Math.ceil(frame.first / round) * round; step <= frame.last; step += round) {
      if (!step) continue;
      const x = Math.round(frame.x(step)) + 0.5;
      context.strokeStyle = ink("--soft");
      context.globalAlpha = 0.5;
      context.beginPath();
      context.moveTo(x, TOP);
      context.lineTo(x, height - BOTTOM);
      context.stroke();
      context.globalAlpha = 1;
      context.textAlign = "left";
      if (x < width - 70) context.fillText(`round ${step / round + 1}`, x + 5, TOP + 9);
    }
    context.setLineDash([]);
  }

  #crosshair(context, frame, ink, many, height) {
    const x = frame.x(this.pointer);
    context.strokeStyle = ink("--soft");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(Math.round(x) + 0.5, TOP);
    context.lineTo(Math.round(x) + 0.5, height - BOTTOM);
    context.stroke();
    if (many) return;
    for (const { index, line } of this.drawn) {
      const found = nearest(line, this.pointer);
      if (found) dot(context, frame.x(found[0]), frame.y(found[1]), ink(`--n${index}`), 3.5);
    }
  }

  #hover(x, event) {
    if (!this.frame) return;
    this.#readOut(Math.round(this.frame.step(x)), event.clientX, event.clientY);
  }

  #readOut(step, x, y) {
    const { first, last } = this.frame;
    this.pointer = Math.max(first, Math.min(last, step));
    const many = this.data.nodes.length > COLOURS;
    const found = this.drawn
      .map(({ node, index, line, raw }) => ({ node, index, value: nearest(line, this.pointer)?.[1], raw: nearest(raw, this.pointer)?.[1] }))
      .filter(({ value }) => value !== undefined);
    const values = found.map(({ value }) => value);
    const rows = many
      ? [["median", median(values), "var(--accent)"], ["lowest", Math.min(...values), null], ["highest", Math.max(...values), null],
        ...found.filter(({ node }) => node.key === this.data.selected).map(({ node, value }) => [node.node, value, "var(--chosen)"])]
      : found.map(({ node, index, value }) => [node.node, value, `var(--n${index})`]);
    const list = make("table");
    for (const [name, value, style] of rows) {
      const swatch = make("i", { class: "swatch" });
      if (style) swatch.style.background = style;
      list.append(make("tr", {}, make("td", {}, swatch, name), make("td", { text: number(value) })));
    }
    showTip(x, y, make("strong", { text: `step ${this.pointer}` }), list);
    this.draw();
  }

  #key(event) {
    const far = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#leave();
    if (!far || !this.frame) return;
    event.preventDefault();
    const { first, last } = this.frame;
    const stride = Math.max(1, Math.round((last - first) / 60));
    const box = this.canvas.getBoundingClientRect();
    const step = (this.pointer ?? (far > 0 ? first - stride : last + stride)) + far * stride;
    const kept = Math.max(first, Math.min(last, step));
    this.#readOut(kept, box.left + this.frame.x(kept), box.top + TOP + 20);
  }

  #leave() {
    this.pointer = null;
    hideTip();
    this.draw();
  }

  #legend(lines) {
    const { nodes, selected } = this.data;
    const many = nodes.length > COLOURS;
    const items = many
      ? [{ key: "median", name: `median of ${lines.length}`, style: "var(--accent)" }, { key: "each", name: "each node", style: "var(--many-line)" },
        ...nodes.filter((node) => node.key === selected).map((node) => ({ key: node.key, name: node.node, style: "var(--chosen)" }))]
      : nodes.map((node, index) => ({ key: node.key, name: node.node, style: `var(--n${index})`, one: true }));
    sync(
      this.legend, items, (item) => item.key,
      (item) => make("li", {}, item.one ? make("button", { onclick: () => this.choose(item.key) }, make("i"), make("span")) : make("span", {}, make("i"), make("span"))),
      (child, item) => {
        const inner = child.firstElementChild;
        inner.children[0].style.background = item.style;
        say(inner.children[1], item.name);
        if (item.one) attr(inner, "aria-pressed", item.key === selected);
      },
    );
  }

  #describe(lines) {
    const latest = lines.map(({ node, line }) => [node.node, line.at(-1)[1]]);
    const text = lines.length > COLOURS
      ? `median ${number(median(latest.map(([, value]) => value)))} of ${lines.length} nodes`
      : latest.map(([name, value]) => `${name} ${number(value)}`).join(", ");
    attr(this.canvas, "aria-label", `${MEASURES[this.measure].title} by step. Now: ${text || "no step yet"}. Arrow keys read it out.`);
  }
}

function smoothed(points, log) {
  const scale = log ? Math.log : (value) => value;
  const back = log ? Math.exp : (value) => value;
  let [sum, weight] = [0, 0];
  return points.map(([step, value]) => {
    sum = SMOOTHING * sum + (1 - SMOOTHING) * scale(value);
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return [step, back(sum / weight)];
  });
}

function medians(lines, { first, last }) {
  const bins = 360;
  const found = [];
  for (let bin = 0; bin <= bins; bin += 1) {
    const step = first + ((last - first) * bin) / bins;
    const value = median(lines.map(({ line }) => (line[0][0] <= step && line.at(-1)[0] >= step - (last - first) / bins ? nearest(line, step)[1] : NaN)));
    if (Number.isFinite(value)) found.push([step, value]);
  }
  return found;
}

function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  if (high < 0) return undefined;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  const before = points[Math.max(0, low - 1)];
  return step - before[0] < points[low][0] - step ? before : points[low];
}

function dot(context, x, y, style, radius) {
  context.globalAlpha = 1;
  context.fillStyle = style;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

function nice(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / stride); at * stride <= high * (1 + 1e-9) && found.length < 40; at += 1) found.push(Number((at * stride).toPrecision(12)));
  return found;
}

function decades(bottom, top) {
  const found = [];
  const factors = top - bottom < 1.2 ? [1, 2, 5] : top - bottom < 2.5 ? [1, 3] : [1];
  const every = Math.max(1, Math.ceil((top - bottom) / 7));
  for (let power = Math.floor(bottom); power <= Math.ceil(top) && found.length < 40; power += every) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (Math.log10(value) >= bottom && Math.log10(value) <= top) found.push(value);
    }
  }
  return found;
}

function short(value) {
  const far = Math.abs(value);
  if (value === 0) return "0";
  if (far >= 1e5 || far < 1e-3) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}
