// The page: puts conversations, chat, settings and the live panel together, and keeps the connection.

import { getJson, key } from "./api.js";
import { Chat } from "./chat.js";
import { $, announce, bytes, iconButton, make } from "./dom.js";
import { LivePanel } from "./live.js";
import { SettingsDialog } from "./settings.js";
import * as store from "./store.js";

const EXAMPLES = [
  "Explain what a Mixture-of-Experts model is, to a curious child.",
  "Write a short poem about a lighthouse that has lost its sea.",
  "Compare bread and pasta in a small table.",
  "Write a Python function that finds the median of a list.",
];
const BEGINNINGS = ["Once upon a time, there was a little fox who", "The old clockmaker opened the door and", "On the last day of summer,", "Lily and Tom found a box in the garden."];
const LONGEST_WAIT = 10; // seconds between two attempts to connect

let conversation;
let props = null;
const narrow = matchMedia("(max-width: 980px)"); // where the list is a drawer, as in page.css

const settings = new SettingsDialog({ changed: () => conversation.messages.length && store.save(conversation) });
const chat = new Chat({
  changed: listConversations,
  failed: (error) => {
    if (error.status === 401) askKey();
    else if (error.status === 0) connect();
  },
  parameters: () => settings.parameters(),
});
const live = new LivePanel({ lost: liveLost, found });

// --- conversations ---

function open(one) {
  conversation = one;
  store.current.set(one.id);
  settings.setConversation(one);
  chat.open(one);
  listConversations();
  closeSide();
}

function listConversations() {
  const all = store.conversations();
  $("title").textContent = conversation.title || "New conversation";
  $("export").disabled = !all.length;
  $("conversations").replaceChildren(...all.map(conversationRow));
}

function conversationRow(one) {
  const chosen = one.id === conversation.id;
  const go = make("button", { type: "button", class: "go", "aria-current": chosen ? "true" : null, onclick: () => chosen || open(store.load(one.id)) }, one.title || "Untitled");
  const rename = iconButton("edit", `Rename ${one.title}`, () => renameIn(row, one));
  const bin = iconButton("bin", `Delete ${one.title}`, () => remove(one));
  const row = make("li", { class: chosen ? "chosen" : null }, go, rename, bin);
  return row;
}

function renameIn(row, one) {
  const field = make("input", { type: "text", "aria-label": "Title", maxlength: "120", value: one.title });
  let over = false;
  const finish = (keep) => {
    if (over) return;
    over = true;
    if (keep && field.value.trim()) {
      const target = one.id === conversation.id ? conversation : one;
      target.title = field.value.trim();
      store.save(target);
    }
    listConversations();
    $("conversations").querySelector("[aria-current]")?.focus();
  };
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  field.addEventListener("blur", () => finish(true));
  row.replaceChildren(field);
  field.select();
}

function remove(one) {
  const dialog = $("confirm");
  $("confirm-text").textContent = `Delete “${one.title || "Untitled"}”? It is kept nowhere else.`;
  dialog.returnValue = "no";
  dialog.onclose = () => {
    if (dialog.returnValue !== "yes") return;
    if (one.id === conversation.id) chat.stop();
    store.remove(one.id);
    announce("Deleted.");
    if (one.id === conversation.id) open(store.conversations()[0] ?? store.newConversation());
    else listConversations();
  };
  dialog.showModal();
}

function exportAll() {
  const file = new Blob([JSON.stringify({ format: "fate-conversations", version: 1, conversations: store.conversations() }, null, 2)], { type: "application/json" });
  const address = URL.createObjectURL(file);
  make("a", { href: address, download: `fate-conversations-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// --- the message field ---

function fit() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.35)}px`;
  $("send").disabled = !field.value.trim();
}

function send() {
  const field = $("message");
  if (!field.value.trim() || chat.busy) return;
  const text = field.value;
  field.value = "";
  fit();
  chat.send(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("input", fit);
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => {
  chat.stop();
  $("message").focus();
});
$("scroll").addEventListener("scroll", () => chat.scrolled(), { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if ($("app").hasAttribute("data-side")) closeSide();
  else chat.stop();
});

// Whether the model has no chat template: it was made to go on with a text.
const isPlain = () => props?.chat_template === "plain";

function showExamples() {
  $("examples").replaceChildren(
    ...(isPlain() ? BEGINNINGS : EXAMPLES).map((text) =>
      make("li", {}, make("button", { type: "button", onclick: () => ($("message").value = text) && (fit(), send()) }, text)),
    ),
  );
}

// --- views, theme ---

function show(view) {
  $("app").dataset.view = view;
  for (const name of ["chat", "experts"]) $(`view-${name}`).setAttribute("aria-pressed", String(name === view));
}

$("view-chat").addEventListener("click", () => show("chat"));
$("view-experts").addEventListener("click", () => show("experts"));

function openSide() {
  $("app").setAttribute("data-side", "");
  $("menu").setAttribute("aria-expanded", "true");
  $("veil").hidden = false;
  $("side").inert = false;
  $("new").focus();
}

function closeSide() {
  const was = $("app").hasAttribute("data-side");
  $("app").removeAttribute("data-side");
  $("menu").setAttribute("aria-expanded", "false");
  $("veil").hidden = true;
  $("side").inert = narrow.matches; // not reached by the keyboard while it is out of sight
  if (was) $("menu").focus();
}

$("menu").addEventListener("click", openSide);
$("side-close").addEventListener("click", closeSide);
$("veil").addEventListener("click", closeSide);
narrow.addEventListener("change", closeSide);
$("new").addEventListener("click", () => {
  open(store.newConversation());
  $("message").focus();
});
$("export").addEventListener("click", exportAll);
$("tune").addEventListener("click", () => settings.show());

const darkPreferred = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (darkPreferred.matches ? "dark" : "light")) === "dark";

function themeChanged() {
  const words = `Switch to the ${isDark() ? "light" : "dark"} theme`;
  $("theme").setAttribute("aria-label", words);
  $("theme").title = words;
  $("theme-side").querySelector("span").textContent = words;
  for (const id of ["theme", "theme-side"]) $(id).querySelector("use").setAttribute("href", isDark() ? "#i-sun" : "#i-moon");
  live.themeChanged();
}

function switchTheme() {
  const to = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = to;
  store.theme.set(to);
  themeChanged();
}

$("theme").addEventListener("click", switchTheme);
$("theme-side").addEventListener("click", switchTheme);
darkPreferred.addEventListener("change", themeChanged);

// --- the connection ---

let attempts = 0;
let waiting = 0;

function setStatus(state, text) {
  $("status-dot").dataset.state = state;
  $("status").textContent = text;
}

function banner(text) {
  $("banner-text").textContent = text;
  $("banner").hidden = false;
}

function hideBanner() {
  $("banner").hidden = true;
}

function retry(seconds) {
  clearTimeout(waiting);
  waiting = setTimeout(connect, 1000 * seconds);
}

async function connect() {
  clearTimeout(waiting);
  try {
    await getJson("/health");
    props = await getJson("/props");
  } catch (error) {
    return notConnected(error);
  }
  attempts = 0;
  hideBanner();
  const model = String(props.model ?? "").split("/").at(-1);
  const budget = props.budget_bytes;
  setStatus("ready", [model || "Ready", typeof budget === "number" && `${bytes(budget)} of memory`].filter(Boolean).join(" · "));
  document.title = model ? `${model} – fate` : "fate";
  settings.setDefaults(props);
  showExamples();
  live.start();
}

function notConnected(error) {
  if (error.status === 401 || error.status === 403) {
    setStatus("wait", "A key is needed");
    return askKey();
  }
  if (error.status === 503) {
    const { status, error: why, seconds: since } = error.body ?? {};
    if (status === "error") {
      setStatus("lost", "The model could not be loaded");
      banner(String(why));
      return retry(LONGEST_WAIT);
    }
    setStatus("wait", status === "stopping" ? "The server is stopping" : `Loading the model${since ? `, ${Math.round(since)} s` : ""}`);
    return retry(1);
  }
  const seconds = Math.min(LONGEST_WAIT, 2 ** attempts++);
  setStatus("lost", "Not connected");
  banner(`${error.status ? error.message : "The server cannot be reached."} Trying again in ${seconds} s.`);
  retry(seconds);
}

function liveLost(error) {
  if (error?.status === 429) {
    $("shape-line").textContent = error.message;
    setTimeout(() => live.start(), 1000 * (error.retryAfter ?? 5));
    return;
  }
  if (error?.status === 404) {
    $("shape-line").textContent = "This server does not show its experts.";
    return;
  }
  notConnected(error ?? { status: 0, message: "" });
}

$("banner-retry").addEventListener("click", connect);
addEventListener("online", connect);

// The stream has begun: the model is there, and its shape known.
function found({ experts, slots }) {
  hideBanner();
  const total = experts.reduce((a, b) => a + b, 0);
  if (!total) return;
  const fits = slots >= total;
  $("empty-title").textContent = fits ? "A model of many experts" : "A model bigger than its memory";
  const continues = isPlain() ? " It was not taught to converse: it goes on with what you write." : "";
  $("empty-text").textContent = (fits
    ? `All of its ${total} experts fit into memory. Start the server with a smaller --ram to see them come and go.`
    : `Its ${total} experts rest on disk, and ${slots} of them fit into memory at a time. Each token needs a few in every layer; those that are missing are read. Write something and watch them move.`) + continues;
}

function askKey() {
  const dialog = $("ask-key");
  if (dialog.open) return;
  if (key.get()) $("ask-key-text").textContent = "The server did not accept this key.";
  $("key").value = "";
  dialog.onclose = () => {
    if (!$("key").value) return setStatus("lost", "A key is needed");
    key.set($("key").value);
    connect();
  };
  dialog.showModal();
}

store.whenFull(banner);
store.onOtherTab(() => listConversations());
open(store.load(store.current.get()) ?? store.newConversation(settings.lastSystem()));
showExamples();
themeChanged();
fit();
connect();
if (!narrow.matches) $("message").focus();
