// Running charts of the last minute: a number, and its curve.

import { bytes, make, megabytes, reducedMotion, svg } from "./dom.js";

const SPAN = 60; // seconds
const SHORTEST = 12; // that are shown at first
const WIDTH = 240;
const HEIGHT = 34;

// `top` of the scale; null: the largest value shown.
const CHARTS = [
  { key: "tokens_per_second", name: "Tokens per second", say: (v) => v.toFixed(v < 10 ? 2 : 1), unit: "", top: null },
  { key: "ready_on_time", name: "Ready on time", say: (v) => (100 * v).toFixed(1), unit: "%", top: 1 },
  { key: "bytes_per_token", name: "Read per token", say: megabytes, unit: "MB", top: null },
  { key: "stall_share", name: "Time spent waiting", say: (v) => (100 * v).toFixed(1), unit: "%", top: 1 },
  { key: "memory_bytes", name: "Memory", say: (v) => bytes(v), unit: "", top: null },
];

export class Charts {
  constructor(box) {
    this.samples = [];
    this.drawn = 0;
    this.charts = CHARTS.map((chart) => {
      const area = svg("path", { class: "area" });
      const line = svg("path", { class: "curve" });
      const limit = svg("path", { class: "limit" });
      const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, area, limit, line);
      const number = make("b", {}, "–");
      const unit = make("span", {}, "");
      const head = make("div", { class: "chart-head" }, make("dt", {}, chart.name), make("dd", {}, number, unit));
      const node = make("dl", { class: "chart", "data-chart": chart.key }, head, picture);
      box.append(node);
      return { ...chart, node, area, line, limit, number, unit, suffix: chart.unit };
    });
  }

  clear() {
    this.samples = [];
    this.draw();
  }

  tick(tick) {
    this.samples.push(tick);
    while (this.samples.length > 2 && tick.t - this.samples[1].t > SPAN) this.samples.shift();
    const now = performance.now();
    if (document.hidden || (reducedMotion.matches && now - this.drawn < 1000)) return;
    this.drawn = now;
    this.draw();
  }

  draw() {
    const last = this.samples.at(-1);
    for (const chart of this.charts) {
      const now = last?.[chart.key] ?? null;
      if (now !== null) chart.value = now; // what it was stays readable when nothing runs
      const value = chart.value ?? null;
      chart.node.toggleAttribute("data-past", now === null);
      chart.number.textContent = value === null ? "–" : chart.say(value);
      const budget = chart.key === "memory_bytes" ? last?.budget_bytes : null;
      chart.unit.textContent = value === null ? "" : budget ? ` of ${bytes(budget)}` : chart.suffix && ` ${chart.suffix}`;
      this.drawCurve(chart, budget);
    }
  }

  drawCurve(chart, budget) {
    const end = this.samples.at(-1)?.t ?? 0;
    let most = chart.top ?? 0;
    if (chart.top === null) for (const sample of this.samples) most = Math.max(most, sample[chart.key] ?? 0);
    if (budget) most = Math.max(most, budget);
    most = (most || 1) * (chart.top === null ? 1.12 : 1.02);
    const y = (value) => (HEIGHT - 1.5 - (HEIGHT - 3) * (value / most)).toFixed(1);
    const span = Math.min(SPAN, Math.max(SHORTEST, end - (this.samples[0]?.t ?? end)));
    const x = (t) => (WIDTH - (WIDTH / span) * (end - t)).toFixed(1);
    let curve = "";
    let area = "";
    let from = null; // where the part that is drawn began
    let previous = null;
    const close = () => {
      if (from !== null) area += `L${x(previous.t)} ${HEIGHT}L${from} ${HEIGHT}Z`;
      from = null;
    };
    for (const sample of this.samples) {
      const value = sample[chart.key] ?? null;
      if (value === null) {
        close();
        continue;
      }
      const point = `${x(sample.t)} ${y(value)}`;
      curve += from === null ? `M${point}` : `L${point}`;
      area += from === null ? `M${point}` : `L${point}`;
      from ??= x(sample.t);
      previous = sample;
    }
    close();
    chart.line.setAttribute("d", curve);
    chart.area.setAttribute("d", area);
    chart.limit.setAttribute("d", budget ? `M0 ${y(budget)}L${WIDTH} ${y(budget)}` : "");
  }
}

