// The server's HTTP API, with one sentence for everything that goes wrong.

const LOOK_MS = 300; // between two looks at a job's progress
const MOST_WAIT_S = 30;

/** The server has answered with an error and its sentence. */
export class ServerError extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

/** The server did not answer at all; it may be back later. */
export class ConnectionError extends Error {
  constructor() {
    super(
      "The server does not answer. Your photo and the hole are kept in this page: start " +
        "dpnet serve again, then press Fill.",
    );
  }
}

/** Return what the server says about its models: models, default, limits and problem. */
export async function readModels() {
  return (await request("/api/models")).json();
}

/** Return whether the server answers. */
export async function isThere() {
  return fetch("/livez").then((answer) => answer.ok, () => false);
}

/** Keep a vote: {winner, loser, blind, reason}. */
export async function vote(choice) {
  const headers = { "Content-Type": "application/json" };
  await request("/api/votes", { method: "POST", headers, body: JSON.stringify(choice) });
}

/**
 * Fill a photo, and return {blob, model, seconds}.
 *
 * @param order {image, mask, model, format}: the files, the model's id or "", "png" or "same".
 * @param signal ends the request, and the server's work for it.
 * @param report called with {state, position, done, total, seconds_left}, and {state: "busy", seconds}.
 */
export async function fill(order, signal, report) {
  for (;;) {
    const job = crypto.randomUUID?.() ?? randomName();
    const answer = await post(order, job, signal, report);
    if (answer.status !== 429) return result(answer);
    const seconds = Number(answer.headers.get("Retry-After")) || 2;
    report({ state: "busy", seconds: Math.min(seconds, MOST_WAIT_S) });
    await pause(Math.min(seconds, MOST_WAIT_S) * 1000, signal);
  }
}

async function post(order, job, signal, report) {
  const body = new FormData();
  body.append("image", order.image, "photo"); // the name stays here: the server needs none
  body.append("mask", order.mask, "mask.png");
  if (order.model) body.append("model", order.model);
  body.append("format", order.format);
  body.append("job", job);
  const cancel = () => fetch(`/api/jobs/${job}`, { method: "DELETE" }).catch(() => {});
  const watch = new AbortController();
  signal.addEventListener("abort", cancel);
  follow(job, watch.signal, report);
  try {
    return await request("/api/inpaint", { method: "POST", body, signal }, [429]);
  } finally {
    watch.abort();
    signal.removeEventListener("abort", cancel);
  }
}

/** Report the progress of a job until the signal. */
async function follow(job, signal, report) {
  try {
    for (;;) {
      await pause(LOOK_MS, signal);
      const answer = await fetch(`/api/jobs/${job}`, { signal });
      if (answer.ok) report(await answer.json());
    }
  } catch {
    // The job has ended, or the request itself will say why the server does not answer.
  }
}

async function result(answer) {
  const blob = await answer.blob().catch((error) => {
    throw error.name === "AbortError" ? error : new ConnectionError(); // cut in the middle
  });
  return {
    blob,
    model: answer.headers.get("X-DPNet-Model") ?? "",
    seconds: Number(answer.headers.get("X-DPNet-Seconds")),
  };
}

async function request(path, options = {}, allowed = []) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ConnectionError();
  }
  if (answer.ok || allowed.includes(answer.status)) return answer;
  throw new ServerError(answer.status, await sentence(answer));
}

async function sentence(answer) {
  const body = await answer.json().catch(() => ({}));
  if (typeof body.error === "string") return body.error;
  return `The server refused this with status ${answer.status}: look at its log.`;
}

/** Wait; throw an AbortError at the signal. */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
  });
}

/** Return a name for a job where the browser has no randomUUID: pages that are not on HTTPS. */
function randomName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
