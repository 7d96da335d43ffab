// System prompt of a conversation, sampling for all of them, the key.

import { key } from "./api.js";
import { $, make } from "./dom.js";
import * as store from "./store.js";

// name in the API: label, what it does, limits
const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest token", { min: 0, max: 5, step: 0.05 }],
  ["top_p", "Top p", "Tokens that make up this share of probability", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "Top k", "So many of the likeliest tokens", { min: 0, max: 1000, step: 1 }],
  ["min_p", "Min p", "Tokens at least this likely, against the likeliest", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "Above 1: tokens that have come are less likely", { min: 0.1, max: 3, step: 0.05 }],
  ["presence_penalty", "Presence penalty", "For tokens that have come", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", "For each time they have come", { min: -2, max: 2, step: 0.1 }],
  ["max_tokens", "Max tokens", "The longest answer", { min: 1, max: 1000000, step: 1 }],
  ["seed", "Seed", "The same seed gives the same text", { min: 0, max: 2 ** 53 - 1, step: 1 }],
];

export class SettingsDialog {
  constructor({ changed }) {
    this.changed = changed;
    this.fields = new Map();
    const values = store.sampling.get();
    for (const [name, label, help, limits] of FIELDS) {
      const field = make("input", { id: `s-${name}`, type: "number", inputmode: "decimal", "aria-describedby": `h-${name}`, placeholder: "auto", ...limits });
      if (typeof values[name] === "number") field.value = values[name];
      field.addEventListener("input", () => this.keep());
      this.fields.set(name, field);
      $("sampling").append(make("div", { class: "setting" }, make("label", { for: field.id }, label), field, make("p", { class: "fine", id: `h-${name}` }, help)));
    }
    $("system").addEventListener("input", () => {
      this.conversation.system = $("system").value;
      this.changed();
    });
    $("key-later").addEventListener("change", () => key.set($("key-later").value));
    $("reset").addEventListener("click", () => {
      for (const field of this.fields.values()) field.value = "";
      this.keep();
    });
    // A field out of its limits is not sent; the browser says why before the dialog closes.
    $("settings").addEventListener("cancel", (event) => {
      if (!$("settings-form").reportValidity()) event.preventDefault();
    });
  }

  show() {
    $("system").value = this.conversation.system ?? "";
    $("key-later").value = key.get();
    $("settings").showModal();
  }

  setConversation(conversation) {
    this.conversation = conversation;
  }

  lastSystem() {
    return store.conversations()[0]?.system ?? "";
  }

  // What the server takes where a field is empty.
  setDefaults(props) {
    const defaults = props.sampling_defaults ?? {};
    for (const [name, field] of this.fields) {
      const value = defaults[name];
      field.placeholder = typeof value === "number" ? String(value) : "auto";
    }
    if (props.context_length) this.fields.get("max_tokens").max = props.context_length;
  }

  keep() {
    store.sampling.set(this.parameters());
  }

  parameters() {
    const values = {};
    for (const [name, field] of this.fields) {
      if (field.value !== "" && field.validity.valid) values[name] = field.valueAsNumber;
    }
    return values;
  }
}
