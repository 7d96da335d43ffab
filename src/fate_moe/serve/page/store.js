// Conversations and settings in this browser's localStorage, a key each: two tabs do not overwrite one another's conversations.

const CONVERSATION = "fate.conversation.";
const SAMPLING = "fate.sampling";
const CURRENT = "fate.current";

let failed = () => {};

// `tell` is called when something could not be kept.
export const whenFull = (tell) => (failed = tell);

function keep(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    failed("This browser's storage is full or switched off: what comes now is lost when the page is closed.");
  }
}

function take(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

const isConversation = (one) => one && typeof one.id === "string" && typeof one.title === "string" && Array.isArray(one.messages);

export function conversations() {
  const names = [];
  try {
    for (let at = 0; at < localStorage.length; at++) names.push(localStorage.key(at));
  } catch {
    return [];
  }
  return names
    .filter((name) => name.startsWith(CONVERSATION))
    .map(take)
    .filter(isConversation)
    .sort((a, b) => b.updated - a.updated);
}

export const newConversation = (system = "") => ({
  id: Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join(""), // randomUUID needs https
  title: "",
  system,
  updated: Date.now(),
  messages: [],
});

export const load = (id) => {
  const found = take(CONVERSATION + id);
  return isConversation(found) ? found : null;
};
export const save = (conversation) => keep(CONVERSATION + conversation.id, JSON.stringify(conversation));
export const remove = (id) => localStorage.removeItem(CONVERSATION + id);

export const current = {
  get: () => take(CURRENT),
  set: (id) => keep(CURRENT, JSON.stringify(id)),
};

export const sampling = {
  get: () => take(SAMPLING) ?? {},
  set: (values) => keep(SAMPLING, JSON.stringify(values)),
};

export const theme = {
  set: (name) => localStorage.setItem("fate.theme", name),
};

// `changed` is called with the id of a conversation that another tab wrote or deleted.
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed(event.key?.slice(CONVERSATION.length) ?? null);
  });
}
