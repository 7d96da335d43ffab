// One conversation: its messages, what is being answered, and everything that can be done with them.

import { answer } from "./api.js";
import { $, announce, copy, iconButton, make, megabytes, percent } from "./dom.js";
import { blocks } from "./markdown.js";
import * as store from "./store.js";

const NEAR = 80; // pixels from the end within which the view follows the text
const SAVE = 1000; // milliseconds between two savings of an answer that is being written
const SAY = 4000; // milliseconds between two announcements of streamed text

export class Chat {
  // `hooks`: changed() after the conversation was saved, failed(error), parameters() of the request.
  constructor(hooks) {
    this.hooks = hooks;
    this.views = []; // of the messages, in order
    this.request = null;
    $("messages").addEventListener("click", (event) => {
      const button = event.target.closest(".copy-code");
      if (button) copy(button.closest(".code").querySelector("code").textContent, button);
    });
  }

  get busy() {
    return this.request !== null;
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.show();
    this.toEnd(true);
  }

  show() {
    $("messages").replaceChildren();
    this.views = [];
    this.conversation.messages.forEach((message, index) => this.addView(message, index));
    this.markEmpty();
  }

  markEmpty() {
    $("empty").hidden = this.conversation.messages.length > 0;
  }

  addView(message, index) {
    const view = new MessageView(message, {
      edit: () => this.edit(index),
      again: () => this.again(index),
    });
    this.views.push(view);
    $("messages").append(view.node);
    return view;
  }

  save() {
    this.conversation.updated = Date.now();
    store.save(this.conversation);
    this.hooks.changed();
  }

  send(text) {
    const { messages } = this.conversation;
    if (!this.conversation.title) this.conversation.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
    messages.push({ role: "user", content: text });
    this.addView(messages.at(-1), messages.length - 1);
    return this.ask();
  }

  // Drops the message `index` and all after it.
  cut(index) {
    this.conversation.messages.length = index;
    for (const view of this.views.splice(index)) view.node.remove();
  }

  again(index) {
    if (this.busy) return;
    this.cut(index);
    this.ask();
  }

  edit(index) {
    if (this.busy) return;
    const message = this.conversation.messages[index];
    this.views[index].edit((text) => {
      this.cut(index);
      if (index === 0) this.conversation.title = "";
      this.send(text);
    }, message.content);
  }

  stop() {
    this.request?.abort();
  }

  async ask() {
    const { conversation } = this;
    const request = (this.request = new AbortController());
    const sent = answered(conversation.messages).map(({ role, content }) => ({ role, content }));
    if (conversation.system) sent.unshift({ role: "system", content: conversation.system });
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    const view = this.addView(message, conversation.messages.length - 1);
    const speaker = new Speaker();
    const shown = () => this.conversation === conversation; // another one may be opened meanwhile
    view.wait("Sent");
    this.markEmpty();
    this.save();
    this.setBusy(true);
    this.toEnd(true);
    let saved = performance.now();
    const began = performance.now();
    let failure = null;
    let counted = {};
    try {
      for await (const part of answer({ messages: sent, stream: true, stream_options: { include_usage: true }, ...this.hooks.parameters() }, request.signal)) {
        if (part.loading) view.wait("Waiting for the model to be loaded");
        else if (part.queued !== undefined) view.wait(part.queued > 0 ? `In the queue, ${part.queued} before this one` : "Starting");
        else if (part.read) view.wait("Reading the prompt", part.read);
        else if (part.reasoning) message.reasoning = (message.reasoning ?? "") + part.reasoning;
        else if (part.text) {
          if (message.reasoning && !message.content) message.thought = (performance.now() - began) / 1000;
          message.content += part.text;
          speaker.add(part.text);
        } else if (part.finish) message.finish = part.finish;
        else if (part.counted) counted = { ...counted, ...part.counted };
        if (part.text || part.reasoning) {
          view.draw(() => shown() && this.toEnd());
          if (performance.now() - saved > SAVE) {
            store.save(conversation);
            saved = performance.now();
          }
        }
      }
    } catch (error) {
      if (error.name === "AbortError" || request.signal.aborted) message.stopped = true;
      else failure = error;
    }
    if (failure) message.error = failure.message;
    message.stats = statistics(counted);
    view.finish();
    speaker.end(failure ? `The answer failed: ${failure.message}` : message.stopped ? "Stopped." : "The answer is complete.");
    if (this.request === request) {
      this.request = null;
      this.setBusy(false);
    }
    if (store.load(conversation.id) || shown()) {
      conversation.updated = Date.now();
      store.save(conversation);
    }
    this.hooks.changed();
    if (shown()) this.toEnd();
    if (failure) this.hooks.failed(failure);
  }

  setBusy(busy) {
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    $("app").toggleAttribute("data-busy", busy);
    if (!busy && document.activeElement === document.body) $("message").focus({ preventScroll: true });
  }

  // Follows the text, unless somebody has scrolled up to read.
  toEnd(always = false) {
    const box = $("scroll");
    const left = box.scrollHeight - box.scrollTop - box.clientHeight;
    if (always) this.follows = true;
    if (this.follows || left < NEAR) box.scrollTop = box.scrollHeight;
  }

  scrolled() {
    const box = $("scroll");
    this.follows = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
  }
}

// What the model is shown: not what failed, since most chat templates want question and answer in turn.
function answered(messages) {
  const failed = (at) => messages[at]?.role === "assistant" && !messages[at].content;
  return messages.filter((message, at) => !failed(at) && !(message.role === "user" && failed(at + 1)));
}

function statistics(counted) {
  const { completion_tokens: tokens, decode_tokens_per_second: speed, ready_on_time: ready, bytes_read: read } = counted;
  const [prompt, cached] = [counted.prompt_tokens, counted.prompt_tokens_details?.cached_tokens];
  const { accepted_prediction_tokens: kept, rejected_prediction_tokens: lost } = counted.completion_tokens_details ?? {};
  return [
    tokens !== undefined && `${tokens} tokens`,
    kept + lost > 0 && `${kept} of ${kept + lost} drafts kept`,
    cached && `${cached} of ${prompt} read before`,
    speed !== undefined && `${speed.toFixed(1)} a second`,
    ready !== undefined && `${percent(ready)} of experts ready on time`,
    read !== undefined && `${megabytes(read)} MB read`,
  ]
    .filter(Boolean)
    .join(" · ");
}

// One message on the page. What is streamed is drawn once a frame, and only blocks that have changed.
class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.drawn = []; // [source, node] of the blocks on the page
    const mine = message.role === "user";
    this.body = make("div", { class: "body" });
    this.row = make("div", { class: "actions" });
    this.node = make("li", { class: `message ${mine ? "mine" : "theirs"}` }, make("h2", { class: "hidden" }, mine ? "You" : "Model"), this.body, this.row);
    if (mine) this.body.append(make("div", { class: "said" }, message.content));
    else this.update();
    this.finish();
  }

  edit(done, text) {
    const field = make("textarea", { "aria-label": "Message, edited", rows: "3" });
    field.value = text;
    const leave = () => {
      form.replaceWith(this.body);
      this.row.hidden = false;
      this.row.querySelector("[data-edit]")?.focus();
    };
    const form = make(
      "form",
      {
        class: "edit",
        onsubmit: (event) => {
          event.preventDefault();
          if (field.value.trim()) done(field.value);
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            leave();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            form.requestSubmit();
          }
        },
      },
      field,
      make("div", { class: "edit-foot" }, make("button", { type: "button", class: "quiet", onclick: leave }, "Cancel"), make("button", { type: "submit", class: "primary" }, "Send again")),
    );
    this.row.hidden = true;
    this.body.replaceWith(form);
    field.focus();
    field.style.height = `${Math.min(320, field.scrollHeight + 2)}px`;
  }

  // What happens before the first word.
  wait(words, progress) {
    if (!this.waiting) {
      this.bar = make("progress", { hidden: true });
      this.words = make("span", {});
      this.waiting = make("p", { class: "waiting", role: "status" }, make("i", { class: "pulse" }), this.words, this.bar);
      this.body.append(this.waiting);
    }
    this.words.textContent = progress ? `${words}, ${progress[0]} of ${progress[1]} tokens` : words;
    this.bar.hidden = !progress;
    if (progress) [this.bar.value, this.bar.max] = progress;
    this.row.hidden = true;
  }

  draw(after) {
    if (this.pending) return;
    // A hidden tab has no frames.
    const later = document.hidden ? (f) => setTimeout(f, 500) : requestAnimationFrame;
    this.pending = later(() => {
      this.pending = 0;
      this.update();
      after();
    });
  }

  update() {
    const { message } = this;
    if (message.content || message.reasoning) {
      this.waiting?.remove();
      this.waiting = null;
    }
    if (message.reasoning) this.think();
    this.text ??= this.body.appendChild(make("div", { class: "text" }));
    const now = blocks(message.content);
    let same = 0;
    while (same < now.length && this.drawn[same]?.source === now[same].source) same++;
    for (const { node } of this.drawn.splice(same)) node.remove();
    for (const block of now.slice(same)) {
      const node = block.make();
      this.text.append(node);
      this.drawn.push({ source: block.source, node });
    }
  }

  think() {
    const { message } = this;
    if (!this.thoughts) {
      this.thoughtTitle = make("summary", {}, "Thinking");
      this.thoughtText = make("div", { class: "thought" });
      this.thoughts = make("details", { class: "thoughts" }, this.thoughtTitle, this.thoughtText);
      this.body.prepend(this.thoughts);
    }
    this.thoughtText.textContent = message.reasoning.trim();
    const over = message.content || message.finish;
    this.thoughtTitle.textContent = over ? (message.thought ? `Thought for ${message.thought.toFixed(1)} s` : "Thought") : "Thinking";
  }

  finish() {
    const { message, row, actions } = this;
    if (message.role === "assistant") this.update();
    this.waiting?.remove();
    this.waiting = null;
    this.note?.remove();
    const note =
      message.error ??
      (message.stopped ? "Stopped" : message.finish === "length" ? "Cut at the length limit (max tokens)" : message.finish && !message.content && !message.reasoning ? "The model had nothing to say" : null);
    if (note) {
      this.note = make("p", { class: message.error ? "note error" : "note", role: message.error ? "alert" : null }, note);
      this.body.append(this.note);
    }
    const copyButton = iconButton("copy", "Copy", () => copy(message.content, copyButton));
    const editButton = iconButton("edit", "Edit and send again", actions.edit);
    editButton.dataset.edit = "";
    row.replaceChildren(
      ...(message.role === "user"
        ? [copyButton, editButton]
        : [copyButton, iconButton("again", "Answer again", actions.again), ...(message.stats ? [make("span", { class: "stats" }, message.stats)] : [])]),
    );
    row.hidden = false;
  }
}

// Reads streamed text to screen readers by sentences, not by tokens.
class Speaker {
  constructor() {
    this.unsaid = "";
    this.said = performance.now();
  }

  add(text) {
    this.unsaid += text;
    if (performance.now() - this.said < SAY) return;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.unsaid.lastIndexOf(mark)));
    if (end < 0) return;
    announce(this.unsaid.slice(0, end + 1));
    this.unsaid = this.unsaid.slice(end + 1);
    this.said = performance.now();
  }

  end(words) {
    if (this.unsaid.trim()) announce(this.unsaid);
    announce(words);
  }
}

