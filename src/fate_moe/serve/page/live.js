// The panel beside the chat: follows /live while the page is seen, and says when it cannot.

import { events } from "./api.js";
import { Charts } from "./charts.js";
import { $, make } from "./dom.js";
import { ExpertMap } from "./map.js";

const HIDDEN = 5000; // milliseconds after which a page that nobody sees stops watching
const LAYERS_SEEN = 2000; // milliseconds between two updates of the text

const number = (value) => value.toLocaleString("en");
const times = (count) => (count === 1 ? "once" : `${number(count)} times`);

export class LivePanel {
  // `lost` is called with the error when the stream ends, `found` when it begins.
  constructor({ lost, found }) {
    this.lost = lost;
    this.found = found;
    this.map = new ExpertMap($("map"), (cell) => this.describe(cell));
    this.charts = new Charts($("charts"));
    this.told = 0;
    $("as-text").addEventListener("toggle", () => this.writeSummary());
    document.addEventListener("visibilitychange", () => this.seen(!document.hidden));
  }

  start() {
    this.wanted = true;
    if (!this.stream && !document.hidden) this.follow();
  }

  seen(visible) {
    clearTimeout(this.leaving);
    if (!this.wanted) return;
    if (visible) this.start();
    else this.leaving = setTimeout(() => this.stream?.abort(), HIDDEN);
  }

  async follow() {
    const stream = (this.stream = new AbortController());
    try {
      for await (const { event, data } of events("/live", { signal: stream.signal })) {
        if (event === "shape") {
          const shape = JSON.parse(data);
          this.shape(shape);
          this.found(shape);
        } else if (event === "tick") {
          this.tick(JSON.parse(data));
        }
      }
      this.ended(stream, null);
    } catch (error) {
      this.ended(stream, error);
    }
  }

  ended(stream, error) {
    if (this.stream === stream) this.stream = null;
    if (stream.signal.aborted) {
      if (!document.hidden) this.start();
      return;
    }
    this.wanted = false;
    this.lost(error);
  }

  shape(shape) {
    const { observable, experts, slots } = shape;
    const [fewest, most] = [Math.min(...experts), Math.max(...experts)];
    const each = fewest === most ? most : `${fewest} to ${most}`;
    const total = experts.reduce((a, b) => a + b, 0);
    $("shape-line").textContent = observable
      ? `${experts.length} layers × ${each} experts, room for ${number(slots)} of ${number(total)}`
      : "Rates of the whole model";
    for (const id of ["map", "cell", "as-text"]) $(id).hidden = !observable;
    document.querySelector(".legend").hidden = !observable;
    $("map-none").hidden = observable;
    this.charts.clear();
    if (observable) this.map.setShape(shape);
    this.writeSummary();
  }

  tick(tick) {
    this.map.tick(tick);
    this.charts.tick(tick);
    if (performance.now() - this.told > LAYERS_SEEN) this.writeSummary();
  }

  describe(cell) {
    if (!cell) {
      $("cell").textContent = "Layers run top to bottom, experts left to right.";
      return;
    }
    const missed = cell.misses ? `, missed ${times(cell.misses)} while watching` : "";
    const used = cell.uses ? `used ${times(cell.uses)}` : "not used yet";
    $("cell").textContent = `Layer ${cell.layer}, expert ${cell.expert}: ${cell.resident ? "resident" : "on disk"}, ${used}${missed}`;
  }

  // The map's content for those who do not see it.
  writeSummary() {
    if (!$("as-text").open || !this.map.heat) return;
    this.told = performance.now();
    const rows = this.map.summary().map(([size, resident, uses, misses], layer) =>
      make("tr", {}, make("th", { scope: "row" }, String(layer)), ...[`${resident} of ${size}`, number(uses), number(misses)].map((text) => make("td", {}, text))),
    );
    const heads = ["Layer", "Resident", "Uses", "Misses while watching"].map((text) => make("th", { scope: "col" }, text));
    $("as-text-body").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
  }

  themeChanged() {
    this.map.readColours();
  }
}
