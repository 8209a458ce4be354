// Asks for the board while the page is seen, and shows it: figures, summary, and the canvas through `Board`.

import { Board } from "./board.js";
import { ask, keys } from "./client.js";

const PERIOD_MS = 1000; // between two the board moves on by itself, with what is planned
const LONGEST_PAUSE_MS = 8000;
const TIMEOUT_MS = 5000;
const SUMMARY_MS = 10_000; // a screen reader's user wants it now and then, not every second

const byId = (id) => document.getElementById(id);

export function startBoard() {
  const board = new Board(byId("board"), byId("tip"), byId("board-focus"));
  let timer = 0;
  let asking = null;
  let failures = 0;
  let summary_ms = -Infinity;

  async function poll() {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = new AbortController();
    const late = setTimeout(() => asking.abort(), TIMEOUT_MS);
    try {
      const response = await ask(`v1/board?seconds=${byId("seconds").value}`, { signal: asking.signal });
      const data = await response.json();
      failures = 0;
      board.update(data);
      showFigures(data);
      if (performance.now() - summary_ms > SUMMARY_MS) {
        byId("board-summary").textContent = summaryOf(data);
        summary_ms = performance.now();
      }
      say("live", "Live");
      again(PERIOD_MS);
    } catch (error) {
      failures += 1;
      board.freeze();
      if (error.status === 401) {
        say("key", "An API key is needed");
      } else {
        say("away", error.status ? "Server not ready, trying again" : "Server away, trying again");
        again(Math.min(PERIOD_MS * 2 ** failures, LONGEST_PAUSE_MS));
      }
    } finally {
      clearTimeout(late);
      asking = null;
    }
  }

  function again(pause_ms) {
    clearTimeout(timer);
    timer = setTimeout(poll, pause_ms);
  }

  document.addEventListener("visibilitychange", poll);
  window.addEventListener("online", poll);
  keys.addEventListener("changed", poll);
  byId("seconds").addEventListener("change", poll);
  poll();
  // for tests and for the curious
  window.tetriserve = { board: () => board.data, rectangles: () => board.visible() };
}

function say(state, text) {
  const element = byId("connection");
  element.dataset.state = state;
  if (element.textContent !== text) element.textContent = text; // a live region
}

const sum = (list, value) => list.reduce((total, one) => total + value(one), 0);

const percent = (share) => `${Math.round(100 * share)} %`;

/** Of all cells together, by window in seconds. */
function ratesOf(cells) {
  const gpus = sum(cells, (cell) => cell.gpus.length);
  return Object.fromEntries(
    (cells[0]?.rates ?? []).map(({ seconds }, index) => {
      const met = sum(cells, (cell) => cell.rates[index].met);
      const ended = met + sum(cells, (cell) => cell.rates[index].missed);
      const use = sum(cells, (cell) => cell.rates[index].gpu_use * cell.gpus.length) / gpus;
      return [seconds, { met, ended, use }];
    }),
  );
}

function countsOf(cells) {
  const gpus = cells.flatMap((cell) => cell.gpus);
  return {
    opened: sum(cells, (cell) => cell.open_requests),
    waiting: sum(cells, (cell) => cell.waiting_requests),
    gpus: gpus.length,
    ready: gpus.filter((state) => state === "ready").length,
    lost: gpus.filter((state) => state === "lost").length,
    cordoned: gpus.filter((state) => state === "cordoned").length,
  };
}

function showFigures({ cells }) {
  const set = (id, text) => (byId(id).textContent = text);
  const counts = countsOf(cells);
  set("queue", counts.opened);
  set("waiting", `${counts.waiting} waiting`);
  for (const [seconds, rate] of Object.entries(ratesOf(cells))) {
    set(`slo-${seconds}`, rate.ended ? percent(rate.met / rate.ended) : "–");
    set(`slo-${seconds}-of`, `${rate.met} of ${rate.ended}`);
    set(`use-${seconds}`, percent(rate.use));
  }
  set("gpus-ready", `${counts.ready} of ${counts.gpus} ready`);
  const off = [counts.lost && `${counts.lost} lost`, counts.cordoned && `${counts.cordoned} cordoned`];
  set("gpus-off", off.filter(Boolean).join(", "));
  byId("legend-busy").hidden = !cells.some((cell) => cell.ranges.some((range) => range.kind === "busy"));
  const ranges = sum(cells, (cell) => cell.left_out.ranges);
  const requests = sum(cells, (cell) => cell.left_out.requests);
  const missing = [ranges && `${ranges} short or older ranges`, requests && `${requests} requests`];
  const text = missing.filter(Boolean).join(" and ");
  set("left-out", text && `Not shown: ${text}.`);
}

function summaryOf({ cells }) {
  const counts = countsOf(cells);
  const minutes = ratesOf(cells)[300];
  const busy = sum(cells, (cell) => {
    const running = cell.ranges.filter((range) => range.state === "running");
    return sum(running, (range) => sum(range.gpus, ([, count]) => count));
  });
  const late = sum(cells, (cell) => cell.requests.filter((r) => r.outcome === "open" && r.late).length);
  return [
    `${busy} of ${counts.gpus} GPUs are running steps`,
    counts.gpus === counts.ready ? "" : `, ${counts.gpus - counts.ready} lost or cordoned`,
    `. Open requests: ${counts.opened}, late: ${late}.`,
    minutes?.ended ? ` On time in the last 5 minutes: ${percent(minutes.met / minutes.ended)}.` : "",
  ].join("");
}
