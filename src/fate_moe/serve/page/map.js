// The map: a cell for each expert, a row for each layer (folded where a layer has more experts than the row has room for).

import { reducedMotion } from "./dom.js";

const LEVELS = 24; // shades between resting and just used
const ALARMS = 8; // and between that and just missed
const HALF_LIFE = 420; // milliseconds
const MISS_HALF_LIFE = 160;
const FAINT = 0.02;
const SMALLEST = 2.4; // CSS pixels of a cell, before a layer is folded into several lines
const LARGEST = 22;
const LEAST_HEIGHT = 3;
const TALL = 300; // CSS pixels that the map takes, if its lines are not at their least height

const parse = (text) => {
  const hex = text.trim().slice(1);
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
};
const mix = (a, b, share) => a.map((from, i) => from + (b[i] - from) * share);
const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

export class ExpertMap {
  constructor(canvas, tell) {
    this.canvas = canvas;
    this.tell = tell; // told what the cell under the pointer or the cursor is
    this.context = canvas.getContext("2d");
    this.sizes = [];
    this.first = [0];
    this.chosen = -1; // the cell that is described
    this.frame = 0;
    this.readColours();
    new ResizeObserver(() => this.layOut()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.choose(this.at(event)));
    canvas.addEventListener("pointerdown", (event) => this.choose(this.at(event)));
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.choose(-1));
    canvas.addEventListener("focus", () => this.chosen < 0 && this.choose(0));
    canvas.addEventListener("blur", () => this.choose(-1));
    canvas.addEventListener("keydown", (event) => this.move(event));
  }

  // The whole state: experts by layer, uses since loading by layer and expert, resident bits by layer.
  setShape({ experts, used, resident }) {
    this.sizes = experts;
    this.first = [0];
    for (const size of experts) this.first.push(this.first.at(-1) + size);
    const total = this.first.at(-1);
    const same = this.heat?.length === total;
    this.uses = Float64Array.from(used.flat());
    this.misses = same ? this.misses : new Float64Array(total);
    this.heat = new Float32Array(total);
    this.alarm = new Float32Array(total);
    this.resident = new Uint8Array(total);
    resident.forEach((bits, layer) => this.setResident(layer, bits));
    this.chosen = -1;
    this.layOut();
  }

  tick({ used = [], missed = [], resident = {} }) {
    if (!this.heat) return;
    if (reducedMotion.matches) {
      this.heat.fill(0);
      this.alarm.fill(0);
    }
    const most = used.reduce((before, [, , count]) => Math.max(before, count), 1);
    for (const [layer, expert, count] of used) {
      const cell = this.first[layer] + expert;
      this.uses[cell] += count;
      // Many tokens may have come since the last tick, and used nearly all between them: the busiest shine.
      this.heat[cell] = Math.max(this.heat[cell], 0.45 + 0.55 * (count / most));
    }
    for (const [layer, expert, count = 1] of missed) {
      const cell = this.first[layer] + expert;
      this.misses[cell] += count;
      this.alarm[cell] = 1;
    }
    for (const [layer, bits] of Object.entries(resident)) this.setResident(Number(layer), bits);
    this.canvas.dataset.ticks = Number(this.canvas.dataset.ticks) + 1;
    this.canvas.dataset.lit = used.length;
    if (used.length) this.canvas.dataset.seen = Number(this.canvas.dataset.seen ?? 0) + used.length;
    if (this.chosen >= 0) this.describe();
    this.draw();
  }

  setResident(layer, bits) {
    const bytes = atob(bits);
    for (let expert = 0; expert < this.sizes[layer]; expert++) {
      this.resident[this.first[layer] + expert] = (bytes.charCodeAt(expert >> 3) >> (expert & 7)) & 1;
    }
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const [disk, resident, used, missed, ground, ink] = ["disk", "resident", "used", "missed", "panel", "ink"].map((name) =>
      parse(style.getPropertyValue(`--${name}`)),
    );
    const steps = (from, to, most) => Array.from({ length: most + 1 }, (_, level) => mix(from, to, level / most));
    // By residency, heat and alarm: a miss flashes over what the cell is besides.
    this.shades = [disk, resident].map((base) => steps(base, used, LEVELS).map((warm) => steps(warm, missed, ALARMS).map(css)));
    this.ground = css(ground);
    this.ink = css(ink);
    this.draw();
  }

  layOut() {
    if (!this.sizes.length) return;
    const width = this.canvas.parentElement.clientWidth;
    const most = Math.max(...this.sizes);
    const perLine = Math.min(most, Math.floor(width / SMALLEST));
    this.folds = Math.ceil(most / perLine);
    this.perLine = Math.ceil(most / this.folds);
    const ratio = devicePixelRatio || 1;
    // Cells begin and end on device pixels, so that no seam is blurred.
    const whole = Math.floor(Math.min(width, LARGEST * this.perLine) * ratio);
    this.edges = Array.from({ length: this.perLine + 1 }, (_, column) => Math.round((whole * column) / this.perLine));
    this.cell = Math.floor(whole / this.perLine);
    const lines = this.sizes.length * this.folds;
    this.height = Math.round(ratio * Math.max(LEAST_HEIGHT, Math.min((2.5 * this.cell) / ratio, TALL / lines, LARGEST)));
    const between = this.folds > 1 ? Math.round(2 * ratio) : 0; // around a layer's lines
    this.step = this.height * this.folds + between;
    this.gap = Math.min(this.cell, this.height) >= 5 * ratio ? Math.max(1, Math.round(ratio)) : 0;
    this.seam = this.gap || this.height < 5 * ratio ? 0 : Math.max(1, Math.round(ratio)); // a seam below each line
    this.canvas.width = whole;
    this.canvas.height = this.step * this.sizes.length - between;
    this.canvas.style.width = `${this.canvas.width / ratio}px`;
    this.canvas.style.height = `${this.canvas.height / ratio}px`;
    this.ratio = ratio;
    this.draw();
  }

  draw() {
    if (!this.heat || this.frame) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = 0;
      this.paint(now);
    });
  }

  paint(now) {
    const { context, heat, alarm, sizes, cell, edges, height, gap, folds, perLine, step } = this;
    const still = reducedMotion.matches;
    const passed = still ? 0 : Math.min(200, now - (this.painted ?? now));
    const [fade, missFade] = [0.5 ** (passed / HALF_LIFE), 0.5 ** (passed / MISS_HALF_LIFE)];
    this.painted = now;
    context.fillStyle = this.ground;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const seam = this.seam;
    const hole = Math.round(Math.min(cell, height) / 3);
    let moving = false;
    for (let layer = 0; layer < sizes.length; layer++) {
      const top = layer * step;
      for (let expert = 0, index = this.first[layer]; expert < sizes[layer]; expert++, index++) {
        const fold = folds > 1 ? Math.floor(expert / perLine) : 0;
        const x = edges[expert - fold * perLine];
        const wide = edges[expert - fold * perLine + 1] - x - gap;
        const y = top + fold * height;
        const miss = alarm[index] > FAINT;
        const warm = this.shades[this.resident[index]][Math.round(LEVELS * heat[index] ** 0.7)];
        context.fillStyle = warm[Math.round(ALARMS * alarm[index])];
        context.fillRect(x, y, wide, height - (gap || seam));
        if (miss && gap && alarm[index] > 0.3) {
          context.fillStyle = this.ground; // a hole: told apart without colours
          context.fillRect(x + ((wide - hole) >> 1), y + ((height - gap - hole) >> 1), hole, hole);
        }
        heat[index] = heat[index] > FAINT ? heat[index] * fade : 0;
        alarm[index] = miss ? alarm[index] * missFade : 0;
        moving ||= heat[index] > 0 || alarm[index] > 0;
      }
    }
    if (this.chosen >= 0) {
      const [x, y] = this.place(this.chosen);
      context.strokeStyle = this.ink;
      context.lineWidth = Math.max(1, Math.round(1.5 * this.ratio));
      context.strokeRect(x - gap / 2, y - gap / 2, cell, height);
    }
    if (moving && !still) this.draw();
    else this.painted = undefined;
  }

  layerOf(cell) {
    let layer = 0;
    while (cell >= this.first[layer + 1]) layer++;
    return layer;
  }

  place(cell) {
    const layer = this.layerOf(cell);
    const expert = cell - this.first[layer];
    const fold = Math.floor(expert / this.perLine);
    return [this.edges[expert - fold * this.perLine], layer * this.step + fold * this.height];
  }

  at(event) {
    if (!this.heat) return -1;
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * this.ratio;
    const y = (event.clientY - box.top) * this.ratio;
    const layer = Math.floor(y / this.step);
    const fold = Math.min(this.folds - 1, Math.floor((y - layer * this.step) / this.height));
    const expert = fold * this.perLine + Math.floor((x * this.perLine) / this.canvas.width);
    const inside = layer >= 0 && layer < this.sizes.length && x >= 0 && expert < this.sizes[layer];
    return inside ? this.first[layer] + expert : -1;
  }

  choose(cell) {
    if (cell === this.chosen || !this.heat) return;
    this.chosen = cell;
    this.describe();
    this.draw();
  }

  move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down", Home: "home", End: "end" };
    const step = steps[event.key];
    if (step === undefined || !this.heat) return;
    event.preventDefault();
    const cell = Math.max(0, this.chosen);
    const layer = this.layerOf(cell);
    const expert = cell - this.first[layer];
    const to = (of, number) => this.first[of] + Math.min(number, this.sizes[of] - 1);
    if (step === "up") this.choose(to(Math.max(0, layer - 1), expert));
    else if (step === "down") this.choose(to(Math.min(this.sizes.length - 1, layer + 1), expert));
    else if (step === "home") this.choose(to(layer, 0));
    else if (step === "end") this.choose(to(layer, this.sizes[layer] - 1));
    else this.choose(Math.min(this.first.at(-1) - 1, Math.max(0, cell + step)));
  }

  describe() {
    if (this.chosen < 0) return this.tell(null);
    const cell = this.chosen;
    const layer = this.layerOf(cell);
    this.tell({
      layer,
      expert: cell - this.first[layer],
      resident: this.resident[cell] === 1,
      uses: this.uses[cell],
      misses: this.misses[cell],
    });
  }

  // By layer: [experts, resident, uses, misses].
  summary() {
    return this.sizes.map((size, layer) => {
      let [resident, uses, misses] = [0, 0, 0];
      for (let cell = this.first[layer]; cell < this.first[layer + 1]; cell++) {
        resident += this.resident[cell];
        uses += this.uses[cell];
        misses += this.misses[cell];
      }
      return [size, resident, uses, misses];
    });
  }
}
