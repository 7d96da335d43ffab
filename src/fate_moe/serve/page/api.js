// Calls of the server: JSON, server-sent events read by fetch (EventSource cannot send a key), errors in the server's words.

const KEY = "fate.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// `status` is 0 where the server could not be reached.
export class ApiError extends Error {
  constructor(message, status, code, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // not JSON: the status has to do
  }
  const error = body?.error ?? body?.detail ?? body;
  const words = typeof error === "string" ? error : error?.message;
  const message = words || `The server answered ${response.status} ${response.statusText}`.trim();
  return Object.assign(
    new ApiError(message, response.status, error?.code ?? error?.type, Number(response.headers.get("Retry-After")) || undefined),
    { body },
  );
}

export async function getJson(path, signal) {
  return (await call(path, { signal })).json();
}

// Yields {event, data} and {comment} of a stream of server-sent events.
export async function* events(path, options) {
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { event: "message", data: [] };
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection was lost.", 0);
      }
      if (read.done) return;
      const lines = (rest + read.value).split(/\r\n|\n|\r(?=.)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { event: event.event, data: event.data.join("\n") };
          event = { event: "message", data: [] };
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else {
          const colon = line.indexOf(":");
          const name = colon < 0 ? line : line.slice(0, colon);
          const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (name === "data") event.data.push(value);
          else if (name === "event") event.event = value;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const pause = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

// An answer as it comes: {loading}, {queued}, {read: [done, total]}, {text}, {reasoning}, {finish}, {counted}.
export async function* answer(body, signal) {
  for (;;) {
    try {
      return yield* stream(body, signal);
    } catch (error) {
      if (error.code !== "model_loading") throw error; // nothing has come then: ask again
      yield { loading: true };
      await pause(1000, signal);
    }
  }
}

async function* stream(body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  let whole = false;
  for await (const part of events("/v1/chat/completions", options)) {
    if (part.comment !== undefined) {
      // "queued, 2 ahead", "queued, next", "reading the prompt, 64 of 512 tokens"
      const queued = /^queued\D*(\d*)/.exec(part.comment);
      const read = /^reading\D*(\d+)\D+(\d+)/.exec(part.comment);
      if (read) yield { read: [Number(read[1]), Number(read[2])] };
      else if (queued) yield { queued: Number(queued[1]) };
      continue;
    }
    if (part.data === "[DONE]") {
      whole = true;
      continue;
    }
    const chunk = JSON.parse(part.data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The answer failed.", chunk.error.status ?? 500, chunk.error.code);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage || chunk.timings) yield { counted: { ...chunk.usage, ...chunk.timings } };
  }
  if (!whole && !signal?.aborted) throw new ApiError("The connection was lost before the answer was whole.", 0);
}
