// Requests and their pictures: followed while they run, kept in this browser when they are done.

import { Refused, ask, events, hasKey } from "./client.js";
import { asCurl, asPython, copy } from "./snippets.js";
import { forget, forgetAll, keep, kept } from "./store.js";

const CARDS = 60; // older ones are taken off the page
const TICK_MS = 1000;

const byId = (id) => document.getElementById(id);

let edit = null; // given a file, where pictures can be edited

/** Show what is kept. `editing` takes a picture to be edited; null where the model takes none. */
export async function startGallery(editing) {
  edit = editing;
  byId("forget-all").addEventListener("click", () => {
    forgetAll();
    for (const card of [...byId("results").children]) if (!card.classList.contains("open")) card.remove();
    tidy();
  });
  for (const entry of await kept()) new Card(entry.body, entry.inputs).restore(entry);
}

/** Sends a request, with files to edit or none, and shows what comes of it. */
export async function generate(body, inputs) {
  const card = new Card(body, inputs);
  try {
    const response = await ask(inputs.length ? "v1/images/edits" : "v1/images/generations", {
      method: "POST",
      signal: card.stopped.signal,
      ...content(body, inputs),
    });
    if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
      for await (const event of events(response)) card.take(event);
    } else {
      const answer = await response.json();
      answer.data.forEach((item, picture) => card.finish(picture, item.b64_json, item.metrics));
    }
    if (!card.complete) throw new Refused("the server ended the answer before the picture was done");
    card.keep();
  } catch (error) {
    if (error.name === "AbortError") card.fail("Cancelled.");
    else if (error instanceof Refused) card.fail(sentence(error.message));
    else card.fail("The server does not answer.");
  }
}

/** Of a request: JSON, or a form where there are files. */
function content(body, inputs) {
  if (!inputs.length) return { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) if (value !== undefined) form.append(name, value);
  for (const file of inputs) form.append(inputs.length > 1 ? "image[]" : "image", file);
  return { body: form };
}

/** One request on the page. */
class Card {
  constructor(body, inputs) {
    this.body = body;
    this.inputs = inputs;
    this.stopped = new AbortController();
    this.pictures = Array.from({ length: body.n }, () => ({ done: 0, steps: 0, ahead: 0, finish_ms: null, metrics: null }));
    this.element = make("article", "card open");
    this.element.setAttribute("aria-label", `Request: ${body.prompt}`);
    this.bar = make("progress");
    this.bar.setAttribute("aria-label", "Steps done");
    this.state = make("p", "state", "Sent");
    this.row = make("div", "running");
    this.row.append(this.bar, button("Cancel", () => this.stopped.abort()));
    this.figures = this.pictures.map((_, picture) => this.figure(picture));
    const gallery = make("div", "gallery");
    gallery.append(...this.figures.map((figure) => figure.element));
    this.element.append(make("p", "prompt", body.prompt), this.row, this.state, gallery);
    this.timer = setInterval(() => this.progress(), TICK_MS);
    byId("results").prepend(this.element);
    while (byId("results").children.length > CARDS) byId("results").lastElementChild.remove();
    tidy();
  }

  get complete() {
    return this.pictures.every((one) => one.metrics !== null);
  }

  figure(picture) {
    const element = make("figure");
    const image = make("img");
    const { prompt, n, size } = this.body;
    image.alt = n === 1 ? prompt : `${prompt}, picture ${picture + 1} of ${n}`;
    image.hidden = true;
    const sides = size.split("x").map(Number);
    if (sides.length === 2) [image.width, image.height] = sides;
    const actions = make("div", "actions");
    const caption = make("figcaption");
    element.append(image, actions, caption);
    return { element, image, actions, caption, file: null };
  }

  /** An event of the stream. */
  take(event) {
    if (event.error) throw new Refused(event.error.message);
    const picture = event.picture ?? 0;
    const one = this.pictures[picture];
    one.done = event.steps_done ?? one.done;
    one.steps = event.steps ?? one.steps;
    one.ahead = event.phase === "queue" ? (event.ahead ?? 0) : 0;
    // seconds from now; null when nobody can say
    one.finish_ms = event.predicted_finish_s == null ? null : Date.now() + 1000 * event.predicted_finish_s;
    if (event.type.endsWith(".completed")) return this.finish(picture, event.b64_json, event.metrics);
    if (event.type.endsWith(".partial_image")) {
      this.show(picture, event.b64_json);
      this.figures[picture].image.classList.add("preview");
    }
    this.progress();
  }

  /** Where it is and when it will be done; also when nothing was heard for a while. */
  progress() {
    const steps = sum(this.pictures, (one) => one.steps);
    const done = sum(this.pictures, (one) => (one.metrics ? one.steps : one.done));
    if (!steps || this.complete) return;
    this.bar.max = steps;
    this.bar.value = done;
    const last_ms = Math.max(...this.pictures.map((one) => one.finish_ms ?? 0));
    const left = last_ms ? `, about ${seconds(Math.max(0, last_ms - Date.now()) / 1000)} to go` : "";
    const ahead = Math.min(...this.pictures.map((one) => one.ahead));
    const place = ahead ? `Waiting, ${ahead} ahead, ` : "";
    this.state.textContent = `${place}${done} of ${steps} steps${left}`;
  }

  show(picture, b64) {
    const bytes = Uint8Array.from(atob(b64), (char) => char.charCodeAt(0));
    this.showFile(picture, new Blob([bytes], { type: mediaType(b64) }));
  }

  showFile(picture, file) {
    const figure = this.figures[picture];
    if (figure.file) URL.revokeObjectURL(figure.image.src);
    figure.file = file;
    figure.image.src = URL.createObjectURL(file);
    figure.image.hidden = false;
  }

  finish(picture, b64, metrics) {
    this.show(picture, b64);
    this.finished(picture, metrics);
    if (this.complete) this.end(...this.verdict());
    else this.progress();
  }

  finished(picture, metrics) {
    const { image, actions, caption, file } = this.figures[picture];
    this.pictures[picture].metrics = metrics;
    image.classList.remove("preview");
    caption.replaceChildren(...account(metrics));
    const open = make("a", "", "Open");
    open.href = image.src;
    open.target = "_blank";
    const download = make("a", "", "Download");
    download.href = image.src;
    download.download = `tetriserve-${metrics.seed}.${file.type.split("/")[1]}`;
    actions.replaceChildren(open, download);
    if (edit) actions.append(button("Edit", () => edit(named(file, download.download))));
  }

  fail(message) {
    this.element.classList.add("failed");
    this.end(message, `Request failed: ${message}`);
  }

  end(text, announcement) {
    clearInterval(this.timer);
    this.row.remove();
    this.element.classList.remove("open");
    this.state.textContent = text;
    if (announcement) byId("announcement").textContent = announcement;
    const { body, inputs } = this;
    const actions = make("div", "actions");
    actions.append(
      button("Another seed", () => generate({ ...body, seed: undefined }, inputs)),
      button("Copy curl", () => copied("curl command", asCurl(this.sent, inputs.length, hasKey()))),
      button("Copy Python", () => copied("Python program", asPython(this.sent, inputs.length, hasKey()))),
      button("Remove", () => this.remove()),
    );
    this.state.after(actions);
  }

  /** The request that makes the same again. */
  get sent() {
    const seed = this.pictures[0].metrics?.seed ?? this.body.seed;
    return { ...this.body, seed };
  }

  remove() {
    if (this.id != null) forget(this.id);
    this.element.remove();
    tidy();
  }

  async keep() {
    const files = this.figures.map((figure) => figure.file);
    const metrics = this.pictures.map((one) => one.metrics);
    this.id = await keep({ body: this.body, inputs: this.inputs, files, metrics });
  }

  /** As it was when it was kept. */
  restore({ id, files, metrics }) {
    this.id = id;
    files.forEach((file, picture) => {
      this.showFile(picture, file);
      this.finished(picture, metrics[picture]);
    });
    this.end(this.verdict()[0], "");
  }

  /** What is written and what is said when all is there. */
  verdict() {
    const all = this.pictures.map((one) => one.metrics);
    const slowest_s = Math.max(...all.map((metrics) => metrics.stage_durations.total));
    const late = all.filter((metrics) => metrics.slo_met === false).length;
    const what = all.length === 1 ? "Picture" : `${all.length} pictures`;
    const when = late ? (all.length === 1 ? ", late" : `, ${late} late`) : all[0].slo_met ? ", on time" : "";
    return [`${seconds(slowest_s)}${when}`, `${what} finished in ${seconds(slowest_s)}${when}`];
  }
}

/** What happened to a picture: verdict, stages, the way through the degrees. */
function account(metrics) {
  const verdict = make("p", "verdict");
  if (metrics.slo_s !== null) {
    verdict.append(
      make("strong", metrics.slo_met ? "met" : "missed", metrics.slo_met ? "On time" : "Late"),
      ` ${seconds(metrics.stage_durations.total)} of ${seconds(metrics.slo_s)}`,
    );
  } else {
    verdict.append(`${seconds(metrics.stage_durations.total)}, no deadline`);
  }
  const stages = make("dl", "stages");
  for (const stage of ["queue", "encode", "denoise", "decode"]) {
    const pair = make("div");
    pair.append(make("dt", "", stage), make("dd", "", seconds(metrics.stage_durations[stage])));
    stages.append(pair);
  }
  const path = make("ol", "path");
  path.setAttribute("aria-label", "Steps and the GPUs they ran on");
  for (const range of metrics.steps) {
    const gpus = range.degree === 1 ? `GPU ${range.gpus[0]}` : `${range.degree} GPUs`;
    path.append(make("li", "", `${range.steps} ${range.steps === 1 ? "step" : "steps"} on ${gpus}`));
  }
  const more = [`seed ${metrics.seed}`];
  const again = metrics.lost.length;
  if (again) more.push(`${again} step ${again === 1 ? "range" : "ranges"} run again`);
  if (metrics.truncated?.length) more.push("the prompt was too long, its end was not read");
  return [verdict, stages, path, make("p", "hint", more.join(", "))];
}

function tidy() {
  const some = byId("results").children.length > 0;
  byId("forget-all").hidden = !some;
  byId("results-hint").hidden = some;
}

async function copied(what, text) {
  await copy(text);
  byId("announcement").textContent = `The ${what} is copied.`;
}

function button(text, pressed) {
  const element = make("button", "quiet", text);
  element.type = "button";
  element.addEventListener("click", pressed);
  return element;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

const named = (file, name) => new File([file], name, { type: file.type });

const sum = (list, value) => list.reduce((total, one) => total + value(one), 0);

const seconds = (value) => (value < 0.0995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

/** What base64 of a picture is, from how it begins. */
function mediaType(b64) {
  if (b64.startsWith("/9j/")) return "image/jpeg";
  return b64.startsWith("UklGR") ? "image/webp" : "image/png";
}
