// The form: sends a request, follows it while it runs, and shows the pictures with what happened to them.

import { Refused, ask, events, keepKey, keys } from "./client.js";

const CARDS = 12; // older results are taken off the page

const byId = (id) => document.getElementById(id);

export function startForm() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!byId("key-field").hidden) keepKey(byId("key").value.trim());
    generate(requestBody());
  });
  byId("key").addEventListener("change", () => keepKey(byId("key").value.trim()));
  keys.addEventListener("needed", () => {
    byId("key-field").hidden = false;
    byId("key").required = true;
  });
}

function requestBody() {
  const number = (id, scale = 1) => (byId(id).value === "" ? undefined : Number(byId(id).value) * scale);
  return {
    prompt: byId("prompt").value,
    size: byId("size").value,
    n: number("n"),
    num_inference_steps: number("steps"),
    slo_ms: number("slo", 1000),
    seed: number("seed"),
    stream: true,
    partial_images: 3,
    progress: true,
  };
}

async function generate(body) {
  const card = new Card(body);
  try {
    const response = await ask("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: card.stopped.signal,
    });
    if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
      for await (const event of events(response)) card.take(event);
    } else {
      const answer = await response.json();
      answer.data.forEach((item, picture) => card.finish(picture, item.b64_json, item.metrics));
    }
    if (!card.complete) throw new Refused("the server ended the answer before the picture was done");
  } catch (error) {
    if (error.name === "AbortError") card.fail("Cancelled.");
    else if (error instanceof Refused) card.fail(sentence(error.message));
    else card.fail("The server does not answer.");
  }
}

/** One request on the page. */
class Card {
  constructor(body) {
    this.stopped = new AbortController();
    this.pictures = Array.from({ length: body.n }, () => ({ done: 0, steps: 0, finish_ms: null, metrics: null }));
    this.element = make("article", "card");
    this.element.setAttribute("aria-label", `Request: ${body.prompt}`);
    this.bar = make("progress");
    this.bar.setAttribute("aria-label", "Steps done");
    this.state = make("p", "state", "Sent");
    this.stop = make("button", "quiet", "Cancel");
    this.stop.type = "button";
    this.stop.addEventListener("click", () => this.stopped.abort());
    this.row = make("div", "running");
    this.row.append(this.bar, this.stop);
    this.figures = this.pictures.map((_, picture) => this.figure(body, picture));
    const gallery = make("div", "gallery");
    gallery.append(...this.figures.map((figure) => figure.element));
    this.element.append(make("p", "prompt", body.prompt), this.row, this.state, gallery);
    byId("results-title").hidden = false;
    byId("results").prepend(this.element);
    while (byId("results").children.length > CARDS) byId("results").lastElementChild.remove();
  }

  get complete() {
    return this.pictures.every((one) => one.metrics !== null);
  }

  figure(body, picture) {
    const element = make("figure");
    const image = make("img");
    image.alt = body.n === 1 ? body.prompt : `${body.prompt}, picture ${picture + 1} of ${body.n}`;
    image.hidden = true;
    [image.width, image.height] = body.size.split("x").map(Number);
    const caption = make("figcaption");
    element.append(image, caption);
    return { element, image, caption };
  }

  /** An event of the stream. */
  take(event) {
    if (event.error) throw new Refused(event.error.message);
    const picture = event.picture ?? 0;
    const one = this.pictures[picture];
    one.done = event.steps_done ?? one.done;
    one.steps = event.steps ?? one.steps;
    // seconds from now; null when nobody can say
    one.finish_ms = event.predicted_finish_s == null ? null : Date.now() + 1000 * event.predicted_finish_s;
    if (event.type === "image_generation.completed") return this.finish(picture, event.b64_json, event.metrics);
    if (event.type === "image_generation.partial_image") {
      this.show(picture, event.b64_json);
      this.figures[picture].image.classList.add("preview");
    }
    this.progress();
  }

  progress() {
    const steps = sum(this.pictures, (one) => one.steps);
    const done = sum(this.pictures, (one) => (one.metrics ? one.steps : one.done));
    if (!steps) return;
    this.bar.max = steps;
    this.bar.value = done;
    const last_ms = Math.max(...this.pictures.map((one) => one.finish_ms ?? 0));
    const left = last_ms ? `, about ${seconds(Math.max(0, last_ms - Date.now()) / 1000)} to go` : "";
    this.state.textContent = `${done} of ${steps} steps${left}`;
  }

  show(picture, b64) {
    const { image } = this.figures[picture];
    image.src = `data:${mediaType(b64)};base64,${b64}`;
    image.hidden = false;
  }

  finish(picture, b64, metrics) {
    const { image, caption } = this.figures[picture];
    this.pictures[picture].metrics = metrics;
    this.show(picture, b64);
    image.classList.remove("preview");
    caption.replaceChildren(...account(metrics));
    if (this.complete) this.end(...this.verdict());
    else this.progress();
  }

  fail(message) {
    this.element.classList.add("failed");
    this.end(message, `Request failed: ${message}`);
  }

  end(text, announcement) {
    this.row.remove();
    this.state.textContent = text;
    byId("announcement").textContent = announcement;
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
  return [verdict, stages, path, make("p", "hint", more.join(", "))];
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

const sum = (list, value) => list.reduce((total, one) => total + value(one), 0);

const seconds = (value) => (value < 0.0995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

/** What base64 of a picture is, from how it begins. */
function mediaType(b64) {
  if (b64.startsWith("/9j/")) return "image/jpeg";
  return b64.startsWith("UklGR") ? "image/webp" : "image/png";
}
