// The board on a canvas: a lane per GPU, time running from right to left, a rectangle per step range.

const AHEAD = 0.2; // of what is shown of the past
const COLOURS = 12;
const GUTTER_PX = 58;
const TOP_PX = 20; // deadlines
const BOTTOM_PX = 24; // rounds and times
const CELL_GAP_PX = 14;
const BOARD_PX = 340; // what the lanes share, between a smallest and a largest lane
const LANE_PX = [9, 46];
const LABEL_PX = 11;
const DEADLINE_LINES = 40; // more of them are a thicket
const JUMP_S = 0.25; // the clocks drifted, or a reply was late: do not smooth

const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Board {
  /** `tip` shows what the pointer is over; `spoken` is read out when keys move the focus. */
  constructor(canvas, tip, spoken) {
    this.canvas = canvas;
    this.tip = tip;
    this.spoken = spoken;
    this.pen = canvas.getContext("2d");
    this.data = { seconds: 30, cells: [] };
    this.rectangles = [];
    this.marks = { deadlines: [], rounds: [] };
    this.lanes = [];
    this.offsets = new Map();
    this.chosen = null;
    this.pointer = null;
    this.frozen_s = null;
    this.changed = true;
    this.drawn_px = NaN;
    this.theme();
    dark.addEventListener("change", () => this.theme());
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
    this.listen();
    this.resize();
    requestAnimationFrame(() => this.frame());
  }

  /** Seconds on the page's own clock; stands still while the server is away. */
  get now_s() {
    return this.frozen_s ?? performance.now() / 1000;
  }

  freeze() {
    this.frozen_s ??= performance.now() / 1000;
    this.canvas.classList.add("old");
    this.changed = true;
  }

  // ---- data ---------------------------------------------------------------------------------------------

  update(data) {
    const before = this.lanes.length;
    this.data = data;
    this.frozen_s = null;
    this.canvas.classList.remove("old");
    this.rectangles = [];
    this.marks = { deadlines: [], rounds: [] };
    this.lanes = data.cells.flatMap((cell, place) =>
      cell.gpus.map((state, gpu) => ({ cell: cell.cell, place, gpu, state, from: 0 })),
    );
    let first = 0;
    for (const cell of data.cells) {
      const at = this.clock(cell);
      for (const lane of this.lanes.slice(first, first + cell.gpus.length)) lane.from = at(cell.from_s);
      const requests = new Map(cell.requests.map((request) => [request.request, request]));
      for (const range of cell.ranges) {
        const rectangle = {
          ...range,
          cell: cell.cell,
          degree: range.gpus.reduce((sum, [, count]) => sum + count, 0),
          lanes: range.gpus.map(([gpu, count]) => [first + gpu, count]),
          from: at(range.start_s),
          to: at(range.end_s),
          about: requests.get(range.request),
        };
        this.rectangles.push(rectangle);
      }
      for (const request of cell.requests) {
        if (request.outcome === "open" && request.deadline_s !== null) {
          this.marks.deadlines.push({ at: at(request.deadline_s), colour: request.colour, late: request.late });
        }
      }
      this.marks.rounds.push(...cell.rounds_s.map(at));
      first += cell.gpus.length;
    }
    if (this.chosen) this.chosen = this.rectangles.find((one) => same(one, this.chosen)) ?? null;
    if (this.lanes.length !== before) this.resize();
    this.changed = true;
  }

  /** A cell's times on the page's clock, without the jitter of the network. */
  clock(cell) {
    const heard = performance.now() / 1000 - cell.now_s;
    const known = this.offsets.get(cell.cell) ?? heard;
    const offset = Math.abs(heard - known) > JUMP_S ? heard : known + 0.1 * (heard - known);
    this.offsets.set(cell.cell, offset);
    return (from_now_s) => cell.now_s + from_now_s + offset;
  }

  /** The rectangles that can be seen now. */
  visible() {
    const left_s = this.now_s - this.data.seconds;
    return this.rectangles.filter((one) => this.end(one) > left_s);
  }

  /** A range that runs longer than predicted goes on until now. */
  end(rectangle) {
    return rectangle.state === "running" ? Math.max(rectangle.to, this.now_s) : rectangle.to;
  }

  // ---- where things are ---------------------------------------------------------------------------------

  resize() {
    const cells = Math.max(1, this.data.cells.length);
    const lanes = Math.max(1, this.lanes.length);
    this.lane_px = Math.min(LANE_PX[1], Math.max(LANE_PX[0], BOARD_PX / lanes));
    this.width = this.canvas.parentElement.clientWidth;
    this.height = TOP_PX + lanes * this.lane_px + (cells - 1) * CELL_GAP_PX + BOTTOM_PX;
    this.ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
    this.canvas.style.height = `${this.height}px`;
    this.changed = true;
  }

  get pxPerSecond() {
    return (this.width - GUTTER_PX) / (this.data.seconds * (1 + AHEAD));
  }

  x(at_s) {
    return GUTTER_PX + (at_s - this.now_s + this.data.seconds) * this.pxPerSecond;
  }

  y(lane) {
    return TOP_PX + lane * this.lane_px + (this.lanes[lane]?.place ?? 0) * CELL_GAP_PX;
  }

  /** [left, top, width, height] of each part of a rectangle, cut to the board. */
  boxes(rectangle) {
    const left = Math.max(GUTTER_PX, this.x(rectangle.from));
    const right = Math.min(this.width, this.x(this.end(rectangle)));
    const gap = this.lane_px > 14 ? 2 : 1;
    const [which, of] = rectangle.share; // who shares steps has a strip each
    return rectangle.lanes.map(([lane, count]) => {
      const height = (count * this.lane_px - gap) / of;
      return [left, this.y(lane) + gap / 2 + which * height, Math.max(1, right - left), height];
    });
  }

  // ---- drawing ------------------------------------------------------------------------------------------

  /** Colours of the page; the hues of neighbours in time are far apart. */
  theme() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(`--${name}`).trim();
    this.font = `${LABEL_PX}px ${style.fontFamily}`;
    const names = ["text", "muted", "line", "lane", "accent", "busy"];
    this.colours = Object.fromEntries(names.map((name) => [name, value(name)]));
    this.fills = [];
    for (let colour = 0; colour < COLOURS; colour += 1) {
      const hue = 255 + ((colour * 5) % COLOURS) * (360 / COLOURS);
      const fill = dark.matches ? `oklch(0.46 0.09 ${hue})` : `oklch(0.84 0.08 ${hue})`;
      const edge = dark.matches ? `oklch(0.76 0.11 ${hue})` : `oklch(0.5 0.12 ${hue})`;
      this.fills.push({ fill, edge, hatch: this.hatch(edge) });
    }
    this.lostHatch = this.hatch(this.colours.line);
    this.changed = true;
  }

  hatch(colour) {
    const size = 7 * Math.max(1, Math.round(window.devicePixelRatio || 1));
    const tile = document.createElement("canvas");
    tile.width = tile.height = size;
    const pen = tile.getContext("2d");
    pen.strokeStyle = colour;
    pen.lineWidth = size / 4;
    pen.beginPath();
    for (const shift of [-size, 0, size]) {
      pen.moveTo(shift - 1, size + 1);
      pen.lineTo(shift + size + 1, -1);
    }
    pen.stroke();
    return this.pen.createPattern(tile, "repeat");
  }

  frame() {
    requestAnimationFrame(() => this.frame());
    const shift_px = Math.floor(this.now_s * this.pxPerSecond * this.ratio);
    // nothing on the canvas would look different
    if (!this.changed && (still.matches || shift_px === this.drawn_px)) return;
    this.drawn_px = shift_px;
    this.changed = false;
    this.draw();
    if (this.pointer) this.hover();
  }

  draw() {
    const pen = this.pen;
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    pen.font = this.font;
    pen.textBaseline = "middle";
    this.drawLanes();
    this.drawRounds();
    for (const rectangle of this.visible()) this.drawRectangle(rectangle);
    this.drawTimes();
    this.drawDeadlines();
    if (this.chosen) this.drawFocus();
  }

  drawLanes() {
    const pen = this.pen;
    const every = Math.ceil((LABEL_PX + 2) / this.lane_px);
    const cells = this.data.cells.length > 1;
    this.lanes.forEach(({ cell, gpu, state, from }, lane) => {
      const y = this.y(lane);
      const left = Math.max(GUTTER_PX, this.x(from)); // nothing is known of what was before
      pen.fillStyle = this.colours.lane;
      pen.fillRect(left, y + 0.5, this.width - left, this.lane_px - 1);
      if (state !== "ready") {
        pen.fillStyle = this.lostHatch;
        pen.fillRect(left, y + 0.5, this.width - left, this.lane_px - 1);
      }
      if (gpu % every === 0) {
        pen.fillStyle = this.colours.muted;
        pen.textAlign = "right";
        pen.fillText(cells ? `${cell} · ${gpu}` : `GPU ${gpu}`, GUTTER_PX - 8, y + this.lane_px / 2);
      }
      if (state !== "ready" && this.lane_px > LABEL_PX) {
        pen.fillStyle = this.colours.text;
        pen.textAlign = "left";
        pen.fillText(state, left + 8, y + this.lane_px / 2);
      }
    });
  }

  drawRounds() {
    const pen = this.pen;
    const bottom = this.height - BOTTOM_PX;
    pen.fillStyle = this.colours.muted;
    for (const at_s of this.marks.rounds) {
      const x = Math.round(this.x(at_s));
      if (x >= GUTTER_PX) pen.fillRect(x, bottom + 1, 1, 4);
    }
  }

  drawRectangle(rectangle) {
    const pen = this.pen;
    const colour = rectangle.colour === null ? null : this.fills[rectangle.colour];
    const fill = colour?.fill ?? this.colours.busy;
    const edge = colour?.edge ?? this.colours.muted;
    const now_px = this.x(this.now_s);
    for (const [left, top, width, height] of this.boxes(rectangle)) {
      const ran = Math.min(width, Math.max(0, now_px - left));
      const hasEdge = width > 3;
      pen.fillStyle = hasEdge ? fill : edge; // a narrow one would hardly be seen
      pen.fillRect(left, top, ran, height);
      pen.globalAlpha = 0.45;
      pen.fillRect(left + ran, top, width - ran, height);
      pen.globalAlpha = 1;
      if (rectangle.late) {
        // the hatching travels with the rectangle
        pen.save();
        pen.translate(this.x(rectangle.from), top);
        pen.scale(1 / this.ratio, 1 / this.ratio);
        pen.fillStyle = colour.hatch;
        const from = (left - this.x(rectangle.from)) * this.ratio;
        pen.globalAlpha = 0.75;
        pen.fillRect(from, 0, width * this.ratio, height * this.ratio);
        pen.restore();
      }
      if (hasEdge) {
        pen.strokeStyle = edge;
        pen.lineWidth = 1;
        pen.setLineDash(rectangle.state === "planned" ? [3, 3] : []);
        pen.strokeRect(left + 0.5, top + 0.5, width - 1, height - 1);
        pen.setLineDash([]);
      }
      this.drawDegree(rectangle, left, top, width, height, fill);
    }
  }

  drawDegree(rectangle, left, top, width, height, fill) {
    const pen = this.pen;
    const long = `SP ${rectangle.degree}`;
    const text = width > 34 ? long : width > 14 ? String(rectangle.degree) : "";
    if (!text || height < LABEL_PX) return;
    const middle = left + width / 2;
    if (rectangle.late) {
      const half = pen.measureText(text).width / 2 + 3;
      pen.fillStyle = fill;
      pen.fillRect(middle - half, top + height / 2 - 8, 2 * half, 16);
    }
    pen.fillStyle = this.colours.text;
    pen.textAlign = "center";
    pen.fillText(text, middle, top + height / 2 + 0.5);
  }

  drawTimes() {
    const pen = this.pen;
    const bottom = this.height - BOTTOM_PX;
    const now_px = Math.round(this.x(this.now_s));
    pen.fillStyle = this.colours.accent;
    pen.fillRect(now_px, TOP_PX - 4, 1.5, bottom - TOP_PX + 8);
    pen.textAlign = "center";
    pen.fillText("now", now_px, bottom + 15);
    pen.fillStyle = this.colours.muted;
    const seconds = this.data.seconds;
    for (const back of [1, 2 / 3, 1 / 3]) {
      pen.textAlign = back === 1 ? "left" : "center";
      pen.fillText(`−${seconds * back} s`, this.x(this.now_s - seconds * back), bottom + 15);
    }
    pen.textAlign = "right";
    pen.fillText(`+${seconds * AHEAD} s`, this.width, bottom + 15);
  }

  drawDeadlines() {
    const pen = this.pen;
    const seen = this.marks.deadlines.filter(({ at }) => this.x(at) >= GUTTER_PX && this.x(at) <= this.width);
    for (const { at, colour, late } of seen) {
      const x = this.x(at);
      pen.fillStyle = pen.strokeStyle = this.fills[colour].edge;
      if (seen.length <= DEADLINE_LINES) {
        pen.globalAlpha = 0.6;
        pen.setLineDash([2, 3]);
        pen.beginPath();
        pen.moveTo(x, TOP_PX - 4);
        pen.lineTo(x, this.height - BOTTOM_PX);
        pen.stroke();
        pen.setLineDash([]);
        pen.globalAlpha = 1;
      }
      pen.beginPath();
      pen.moveTo(x - 5, TOP_PX - 13);
      pen.lineTo(x + 5, TOP_PX - 13);
      pen.lineTo(x, TOP_PX - 4);
      pen.closePath();
      if (late) pen.fill();
      else pen.stroke();
    }
  }

  drawFocus() {
    const pen = this.pen;
    pen.strokeStyle = this.colours.text;
    pen.lineWidth = 2.5;
    for (const [left, top, width, height] of this.boxes(this.chosen)) {
      pen.strokeRect(left - 1, top - 1, width + 2, height + 2);
    }
    pen.lineWidth = 1;
  }

  // ---- details ------------------------------------------------------------------------------------------

  listen() {
    this.canvas.addEventListener("pointermove", (event) => {
      this.pointer = [event.offsetX, event.offsetY];
      this.hover();
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.tip.hidden = true;
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.choose(null));
  }

  hover() {
    const [x, y] = this.pointer;
    const inside = ([left, top, width, height]) =>
      x >= left - 1 && x <= left + width + 1 && y >= top && y <= top + height;
    const under = this.visible().findLast((rectangle) => this.boxes(rectangle).some(inside));
    this.showTip(under, x, y);
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") return this.choose(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const seen = this.visible();
    if (!this.chosen) return this.choose(seen.findLast((one) => one.state !== "planned") ?? seen.at(-1));
    this.choose(nearest(seen, this.chosen, ...moves[event.key]) ?? this.chosen);
  }

  choose(rectangle) {
    this.chosen = rectangle ?? null;
    this.changed = true;
    this.spoken.textContent = rectangle ? this.describe(rectangle).join(", ") : "";
    if (!rectangle) return void (this.tip.hidden = true);
    const [left, top, width, height] = this.boxes(rectangle)[0];
    this.showTip(rectangle, left + width / 2, top + height / 2);
  }

  showTip(rectangle, x, y) {
    this.tip.hidden = !rectangle;
    if (!rectangle) return;
    this.tip.replaceChildren(
      ...this.describe(rectangle).map((line) => {
        const element = document.createElement("div");
        element.textContent = line;
        return element;
      }),
    );
    const width = this.tip.offsetWidth;
    const place = Math.min(Math.max(0, x + 14), this.width - width);
    const below = y + 16 + this.tip.offsetHeight < this.height;
    this.tip.style.transform = `translate(${place}px, ${below ? y + 16 : y - this.tip.offsetHeight - 8}px)`;
  }

  /** What is known of a rectangle, in lines. */
  describe(rectangle) {
    const { about, steps, kind, degree, state } = rectangle;
    const gpus = rectangle.gpus.map(([gpu, n]) => (n === 1 ? `${gpu}` : `${gpu}–${gpu + n - 1}`));
    const where = `degree ${degree} on GPU ${gpus.join(", ")}`;
    const cell = this.data.cells.length > 1 ? `cell ${rectangle.cell}, ` : "";
    const from_s = rectangle.from - this.now_s;
    const length = `${(this.end(rectangle) - rectangle.from).toFixed(2)} s`;
    const when = from_s < 0 ? `${length}, began ${(-from_s).toFixed(1)} s ago` : `${length}, in ${from_s.toFixed(1)} s`;
    if (rectangle.request === null) return ["Somebody else's request", cell + where, when];
    const several = rectangle.ranges > 1 ? ` in ${rectangle.ranges} ranges` : "";
    const what = kind === "denoise" ? `${steps} ${steps === 1 ? "step" : "steps"}${several}` : kind;
    const others = rectangle.share[1] - 1;
    const company = others ? ` shared with ${others} other${others === 1 ? "" : "s"}` : "";
    const lines = [
      `Request ${rectangle.request}${about ? `, ${about.shape}` : ""}`,
      `${what}${company}, ${cell}${where}${state === "done" ? "" : `, ${state}`}`,
      when,
    ];
    if (about) lines.push(`${about.steps_done} of ${about.steps} steps done, ${verdict(about)}`);
    return lines;
  }
}

function verdict({ outcome, late }) {
  const words = { met: "on time", late: "late", no_deadline: "no deadline", open: late ? "late" : "open" };
  return words[outcome] ?? outcome.replaceAll("_", " ");
}

/** Whether it is the same range in a newer answer. */
function same(one, other) {
  return (
    one.cell === other.cell &&
    one.request === other.request &&
    one.kind === other.kind &&
    String(one.gpus) === String(other.gpus) &&
    Math.abs(one.from - other.from) < 0.05
  );
}

/** The rectangle to the left, right, above or below: `dx`, `dy` are -1, 0 or 1. */
function nearest(rectangles, from, dx, dy) {
  const lane = (one) => one.lanes[0][0];
  const middle = (one) => (one.from + one.to) / 2;
  const steps = (one) => (dx ? dx * (middle(one) - middle(from)) : dy * (lane(one) - lane(from)));
  const aside = (one) => (dx ? Math.abs(lane(one) - lane(from)) : Math.abs(middle(one) - middle(from)));
  const cost = (one) => steps(one) + (dx ? 10 : 1) * aside(one);
  return rectangles
    .filter((one) => one !== from && steps(one) > 1e-6)
    .reduce((best, one) => (best === null || cost(one) < cost(best) ? one : best), null);
}
