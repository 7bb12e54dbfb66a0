// Talking to the server that this page came from.

export let key = sessionStorage.getItem("key") ?? "";

/** Remembers the API key until the tab is closed. */
export function useKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

async function send(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = `the server answered ${response.status}`;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not JSON: the number has to do */ }
  throw Object.assign(new Error(message), { status: response.status });
}

/** A JSON answer. Throws an Error with the server's own words. */
export async function ask(path, method = "GET", body = undefined) {
  const response = await send(path, { method, body: body && JSON.stringify(body) });
  return response.json();
}

/** The events of a comparison, one after the other. */
export async function* compare(body, signal) {
  const response = await send("v1/compare", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke before the answers were complete");
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (!event.type) throw new Error(event.error.message);
      yield event;
    }
  }
}
