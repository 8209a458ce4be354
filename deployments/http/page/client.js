// Talks to the server: JSON, server-sent events, and the API key where one is needed.

const KEY = "tetriserve.key";

/** Told of "needed" when the server wants a key, and of "changed" when the user gave one. */
export const keys = new EventTarget();

export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  keys.dispatchEvent(new Event("changed"));
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** The server answered, and said no. `status` is HTTP's. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A response that is fine. Throws `Refused`, or fetch's own TypeError when nobody answers. */
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { cache: "no-store", ...options, headers });
  if (response.status === 401) keys.dispatchEvent(new Event("needed"));
  if (!response.ok) throw new Refused(await reason(response), response.status);
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** The data of each server-sent event, parsed; `[DONE]` is left out. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text = (text + (value ?? "")).replaceAll("\r\n", "\n");
    const blocks = text.split("\n\n");
    text = done ? "" : blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      const body = data.map((line) => line.slice(5).trim()).join("\n");
      if (body && body !== "[DONE]") yield JSON.parse(body);
    }
    if (done) return;
  }
}
