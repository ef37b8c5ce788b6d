"use strict";
// Line charts in SVG: raw and smoothed curves of several runs, a label at each end, values under the pointer or keys.

const SVG = "http://www.w3.org/2000/svg";

function svg(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function ticksBetween(low, high, most) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function logTicks(low, high, most) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let k = first; k <= last; k++) for (const f of factors) found.push(f * 10 ** k);
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    if (inside.length <= most || factors.length === 1) {
      const every = Math.ceil(inside.length / most);
      return inside.length >= 2 ? inside.filter((_, k) => k % every === 0) : ticksBetween(low, high, most);
    }
  }
  return [];
}

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15) return value.toExponential(1).replace(/\.0e/, "e").replace("+", "");
  if (size >= 1e9) return trimmed(value / 1e9, 3) + "G";
  if (size >= 1e6) return trimmed(value / 1e6, 3) + "M";
  if (size >= 1e4) return trimmed(value / 1e3, 4) + "k";
  if (size < 1e-3) return value.toExponential(1).replace(/\.0e/, "e").replace("e-", "e−");
  return trimmed(value, 4);
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

// Ticks of one axis with as many decimals as tell them apart.
function tickTexts(values) {
  for (let digits = 1; digits <= 8; digits++) {
    const texts = values.map((value) => (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? short(value) : trimmed(value, digits)));
    if (new Set(texts).size === values.length && values.every((v) => Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 || Math.abs(Number(trimmed(v, digits).replace("−", "-")) - v) < 1e-9 * Math.abs(v))) return texts;
  }
  return values.map(short);
}

// An exponential mean that forgets its beginning, of values at even or uneven distances alike.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function quantile(sorted, q) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(q * (sorted.length - 1))))];
}

// The steps, times or numbers of images of a curve.
function positions(run, curve, axis) {
  if (axis === "images" && run.batch) return curve.steps.map((step) => step * run.batch);
  if (axis === "time" && run.curves.seconds) {
    const { steps, mean } = run.curves.seconds;
    let k = 0;
    return curve.steps.map((step) => {
      while (k < steps.length - 1 && steps[k] < step) k++;
      const before = k ? k - 1 : 0, span = steps[k] - (k ? steps[before] : 0);
      const from = k ? mean[before] : 0, part = span > 0 ? Math.min(1, (step - (k ? steps[before] : 0)) / span) : 1;
      return from + part * (mean[k] - from);
    });
  }
  return curve.steps;
}

function spoken(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
}

const AXES = {
  steps: { title: "step", one: (x) => `step ${Math.round(x).toLocaleString("en")}`, unit: () => [1, ""] },
  images: { title: "images", one: (x) => `${short(x)} images`, unit: () => [1, ""] },
  time: { title: "time", one: spoken, unit: (high) => (high > 7200 ? [3600, " h"] : high > 180 ? [60, " min"] : [1, " s"]) },
};

class Chart {
  // meta: {title, about, scale}; lines: [{run, curve, number}]; shared: {axis, smooth, hidden, several}
  constructor(parent, name, meta, lines, shared) {
    Object.assign(this, { name, meta, lines, shared });
    const card = parent.appendChild(document.createElement("article"));
    card.className = "card chart";
    card.dataset.metric = name;
    const head = card.appendChild(document.createElement("div"));
    head.className = "head";
    head.appendChild(document.createElement("h3")).textContent = meta.title;
    const values = lines.flatMap(({ curve }) => curve.mean);
    const lowest = Math.min(...lines.flatMap(({ curve }) => curve.low || curve.mean));
    const ordered = values.slice().sort((a, b) => a - b);
    this.canLog = values.length > 1 && lowest > 0;
    this.log = this.canLog && meta.scale !== "linear" && quantile(ordered, 0.99) / quantile(ordered, 0.01) > 20;
    if (this.canLog) {
      const button = head.appendChild(document.createElement("button"));
      button.type = "button";
      button.className = "log";
      button.textContent = "log";
      button.setAttribute("aria-label", `Logarithmic scale of ${meta.title}`);
      button.setAttribute("aria-pressed", this.log);
      button.addEventListener("click", () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", this.log);
        this.draw();
      });
    }
    if (meta.about) {
      const about = card.appendChild(document.createElement("p"));
      about.className = "about";
      about.textContent = meta.about;
    }
    this.svg = svg(card, "svg", { tabindex: 0, role: "img" });
    this.svg.addEventListener("pointermove", (event) => this.point(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  visible() {
    return this.lines.filter(({ number }) => !this.shared.hidden.has(number));
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    this.leave();
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const { axis, smooth } = this.shared;
    const { several } = this.shared;
    const seen = this.visible().filter(({ curve }) => curve.mean.length);
    for (const line of seen) {
      line.x = positions(line.run, line.curve, axis);
      line.y = line.curve.mean.length > 12 ? smoothed(line.curve.mean, smooth) : line.curve.mean;
    }
    this.seen = seen;
    this.say(seen);
    const wrong = this.visible().flatMap(({ run, curve }) => positions(run, { steps: curve.wrong || [] }, axis));
    if (!seen.length) {
      svg(this.svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, wrong.length ? "no finite value" : "no run shown");
      return;
    }
    const longest = Math.max(...seen.map(({ run }) => run.name.length));
    const [left, right, top, bottom] = [46, several ? Math.min(longest * 6.8 + 14, 116, width * 0.28) : 50, 10, 26];
    const xHigh = Math.max(...seen.flatMap(({ x }) => x), ...wrong);
    const xLow = Math.min(...seen.map(({ x }) => x[0]), xHigh > 0 ? 0 : xHigh);
    const [yLow, yHigh] = this.range(seen);
    const fx = (x) => left + ((x - xLow) / (xHigh - xLow || 1)) * (width - left - right);
    const scale = this.log ? Math.log : (y) => y;
    const fy = (y) => height - bottom - ((scale(Math.max(y, this.log ? Number.MIN_VALUE : -Infinity)) - scale(yLow)) / (scale(yHigh) - scale(yLow))) * (height - top - bottom);
    this.fx = fx;
    this.fy = fy;

    const yTicks = (this.log ? logTicks : ticksBetween)(yLow, yHigh, 5);
    tickTexts(yTicks).forEach((text, k) => {
      const y = fy(yTicks[k]);
      svg(this.svg, "line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y });
      svg(this.svg, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, text);
    });
    const [size, unit] = AXES[axis].unit(xHigh);
    const xTicks = ticksBetween(xLow / size, xHigh / size, Math.max(2, Math.min(6, (width - left - right) / 70)));
    xTicks.forEach((value) => svg(this.svg, "text", { x: fx(value * size), y: height - 8, "text-anchor": "middle" }, short(value) + unit));
    svg(this.svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });

    const clip = `clip-${this.name.replace(/[^a-z0-9]/gi, (c) => c.codePointAt(0))}`;
    svg(svg(this.svg, "clipPath", { id: clip }), "rect", { x: left, y: top - 6, width: width - left - right + 4, height: height - top - bottom + 8 });
    const area = svg(this.svg, "g", { "clip-path": `url(#${clip})` });
    const path = (x, y) => x.map((at, k) => `${k ? "L" : "M"}${fx(at).toFixed(1)} ${fy(y[k]).toFixed(1)}`).join("");
    for (const { x, y, curve, number } of seen) {
      const colour = `var(--run-${number % 8})`;
      if (curve.low) {
        const back = path(x.slice().reverse(), curve.low.slice().reverse()).replace("M", "L");
        svg(area, "path", { class: "band", d: `${path(x, curve.high)}${back}Z`, style: `fill:${colour}` });
      }
      if (y !== curve.mean && smooth > 0) svg(area, "path", { class: "raw", d: path(x, curve.mean), style: `stroke:${colour}` });
      const dash = number % 8 > 3 ? "7 4" : "none";
      svg(area, "path", { class: "smoothed", d: path(x, y), style: `stroke:${colour}`, "stroke-dasharray": dash });
      if (x.length <= 12) x.forEach((at, k) => svg(area, "circle", { cx: fx(at), cy: fy(y[k]), r: 3, style: `fill:${colour}` }));
    }
    for (const at of wrong.slice(0, 100)) {
      const mark = svg(this.svg, "path", { class: "wrong", d: `M${fx(at) - 4} ${top - 6}h8l-4 7z` });
      svg(mark, "title", {}, `not finite at ${AXES[axis].one(at)}`);
    }
    this.label(seen, several, width, right, top, height - bottom);
    this.mark = svg(this.svg, "g", {});
    this.at = null;
  }

  // What a chart shows: all but a hundredth at either end, so that a few outliers do not flatten the rest.
  range(seen) {
    const all = seen.flatMap(({ curve, y }) => [...curve.mean, ...y]).sort((a, b) => a - b);
    const cut = !this.log && all.length > 100 ? 0.01 : 0;
    let low = Math.min(quantile(all, cut), ...seen.map(({ y }) => y[y.length - 1]));
    let high = Math.max(quantile(all, 1 - cut), ...seen.map(({ y }) => y[y.length - 1]));
    if (this.log) return high > low * 1.0001 ? [low / 1.06, high * 1.06] : [low / 2, high * 2];
    if (high - low < 1e-9 * Math.abs(high) || high === low) {
      const room = Math.abs(high) * 0.02 || 1;
      return [low - room, high + room];
    }
    if (low > 0 && low < 0.35 * high) low = 0;
    const room = (high - low) * 0.06;
    return [low === 0 ? 0 : low - room, high + room];
  }

  label(seen, several, width, right, top, bottom) {
    const labels = seen.map((line) => {
      const last = line.y.length - 1;
      return { line, x: this.fx(line.x[last]) + 7, y: Math.min(bottom, Math.max(top, this.fy(line.y[last]))) };
    });
    labels.sort((a, b) => a.y - b.y);
    for (let k = 1; k < labels.length; k++) labels[k].y = Math.max(labels[k].y, labels[k - 1].y + 14);
    for (let k = labels.length - 1, most = bottom; k >= 0; k--, most -= 14) labels[k].y = Math.min(labels[k].y, most);
    for (const { line, y } of labels) {
      const colour = `var(--run-${line.number % 8})`;
      const letters = Math.floor((right - 9) / 6.6);
      const name = line.run.name;
      const last = line.y[line.y.length - 1];
      const text = several ? (name.length > letters ? `${name.slice(0, letters - 1)}…` : name) : short(Number(last.toPrecision(3)));
      svg(this.svg, "text", { class: "label", x: width - right + 7, y: y + 4, style: `fill:${colour}` }, text);
    }
  }

  say(seen) {
    const parts = seen.map(({ run, y }) => `${run.name} ends at ${short(y[y.length - 1])}`);
    this.svg.setAttribute("aria-label", `${this.meta.title}: ${parts.join(", ") || "nothing shown"}. Arrow keys read values.`);
  }

  point(px) {
    if (!this.seen || !this.seen.length || !this.mark) return;
    const candidates = this.seen.flatMap(({ x }) => x);
    let best = candidates[0];
    for (const x of candidates) if (Math.abs(this.fx(x) - px) < Math.abs(this.fx(best) - px)) best = x;
    this.show(best);
  }

  show(at) {
    this.at = at;
    this.mark.replaceChildren();
    const x = this.fx(at), height = this.svg.clientHeight;
    svg(this.mark, "line", { class: "cursor", x1: x, x2: x, y1: 6, y2: height - 26 });
    const rows = [];
    for (const { run, x: xs, y, curve, number } of this.seen) {
      let k = 0;
      for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - at) < Math.abs(xs[k] - at)) k = i;
      if (at > xs[xs.length - 1] * 1.02 + 1e-9) continue;
      svg(this.mark, "circle", { class: "dot", cx: this.fx(xs[k]), cy: this.fy(y[k]), r: 4, style: `fill:var(--run-${number % 8})` });
      const raw = y === curve.mean ? "" : ` (raw ${short(curve.mean[k])})`;
      rows.push({ name: run.name, text: short(y[k]) + raw, number });
    }
    const tip = document.getElementById("tip");
    tip.replaceChildren();
    tip.appendChild(document.createElement("p")).textContent = AXES[this.shared.axis].one(at);
    for (const { name, text, number } of rows) {
      const row = tip.appendChild(document.createElement("div"));
      row.style.setProperty("--colour", `var(--run-${number % 8})`);
      row.appendChild(document.createElement("i"));
      row.appendChild(document.createElement("span")).textContent = this.shared.several ? name : "";
      row.appendChild(document.createElement("b")).textContent = text;
    }
    tip.hidden = false;
    const box = this.svg.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const right = box.left + x + 14;
    tip.style.left = `${right + own.width > innerWidth - 8 ? Math.max(8, box.left + x - own.width - 14) : right}px`;
    tip.style.top = `${Math.max(8, Math.min(innerHeight - own.height - 8, box.top + 12))}px`;
    return rows;
  }

  key(event) {
    if (!this.seen || !this.seen.length) return;
    const all = [...new Set(this.seen.flatMap(({ x }) => x))].sort((a, b) => a - b);
    const now = this.at === null ? all.length - 1 : all.indexOf(this.at);
    const leap = Math.max(1, Math.round(all.length / 20));
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - leap, PageDown: now + leap, Home: 0, End: all.length - 1 };
    if (event.key === "Escape") return this.leave();
    if (!(event.key in moves)) return;
    event.preventDefault();
    const at = all[Math.min(all.length - 1, Math.max(0, moves[event.key]))];
    const rows = this.show(at);
    document.getElementById("said").textContent = `${AXES[this.shared.axis].one(at)}: ${rows.map(({ name, text }) => `${name} ${text}`).join(", ")}`;
  }

  leave() {
    this.at = null;
    if (this.mark) this.mark.replaceChildren();
    document.getElementById("tip").hidden = true;
  }
}
