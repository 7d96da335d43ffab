// Small helpers. No function here or elsewhere takes HTML.

export const $ = (id) => document.getElementById(id);

// make("button", {class: "quiet", "aria-label": "Copy", onclick: f}, "text", node...)
export function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export const icon = (name) => svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

export function iconButton(name, label, onclick, className = "quiet") {
  return make("button", { type: "button", class: className, "aria-label": label, title: label, onclick }, icon(name));
}

// Copies `text`; the button shows for a moment whether that worked.
export async function copy(text, button, label = "Copied") {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copyByHand(text); // no clipboard on plain http
  }
  const before = [...button.childNodes];
  const words = done ? label : "Not allowed";
  button.replaceChildren(...(button.querySelector("svg") && done ? [icon("done")] : [words]));
  announce(words);
  setTimeout(() => button.replaceChildren(...before), 1400);
}

function copyByHand(text) {
  const field = make("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  try {
    return document.execCommand("copy");
  } finally {
    field.remove();
    focused?.focus();
  }
}

// Says something to screen readers, after what they are saying.
export function announce(text) {
  const region = $("announce");
  region.append(make("p", {}, text));
  while (region.childNodes.length > 6) region.firstChild.remove();
}

export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export const megabytes = (value) => (value / 1e6).toFixed(value >= 1e8 ? 0 : value >= 1e7 ? 1 : 2);
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
