// The form: what to make, by which sizes the model has, and pictures to edit.

import { keepKey, keys } from "./client.js";
import { generate } from "./gallery.js";

const AREAS = [256, 512, 768, 1024, 1536, 2048]; // sides of squares of about as many pixels
const ASPECTS = { Square: [1, 1], "Wide, 16:9": [16, 9], "Wide, 4:3": [4, 3], "Tall, 3:4": [3, 4], "Tall, 9:16": [9, 16] };
const FIRST = "512x512";
const LIKE_INPUT = "auto";

const byId = (id) => document.getElementById(id);

let model = null;
const inputs = []; // files

export function startForm() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!byId("key-field").hidden) keepKey(byId("key").value.trim());
    generate(requestBody(), [...inputs]);
  });
  byId("key").addEventListener("change", () => keepKey(byId("key").value.trim()));
  keys.addEventListener("needed", () => {
    byId("key-field").hidden = false;
    byId("key").required = true;
  });
  byId("image").addEventListener("change", () => {
    [...byId("image").files].forEach(addInput);
    byId("image").value = "";
  });
  byId("strength").addEventListener("input", showStrength);
  addEventListener("dragover", (event) => {
    if (!model?.editing.max_images) return;
    event.preventDefault();
    byId("drop").classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").classList.remove("over");
  });
  addEventListener("drop", (event) => {
    if (!model?.editing.max_images) return;
    event.preventDefault();
    byId("drop").classList.remove("over");
    [...event.dataTransfer.files].filter((file) => file.type.startsWith("image/")).forEach(addInput);
  });
}

/** What the model can make. */
export function setModel(info) {
  model = info;
  byId("model").textContent = info.name;
  byId("steps").max = info.max_steps;
  byId("steps").placeholder = info.default_steps;
  byId("edit-field").hidden = !info.editing.max_images;
  byId("image").required = info.editing.needs_image;
  byId("image").multiple = info.editing.max_images > 1;
  if (info.editing.default_strength !== null) byId("strength").value = info.editing.default_strength;
  showStrength();
  showSizes();
}

/** Take a picture to be edited; the newest replace the oldest where there is no room. */
export function addInput(file) {
  if (!model?.editing.max_images) return;
  while (inputs.length >= model.editing.max_images) inputs.shift();
  inputs.push(file);
  showInputs();
  byId("prompt").focus();
}

function showInputs() {
  const shown = inputs.map((file) => {
    const item = document.createElement("li");
    const image = document.createElement("img");
    image.alt = file.name ?? "picture to edit";
    image.src = URL.createObjectURL(file);
    image.onload = () => URL.revokeObjectURL(image.src);
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "quiet";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${image.alt}`);
    remove.addEventListener("click", () => {
      inputs.splice(inputs.indexOf(file), 1);
      showInputs();
      byId("image").focus();
    });
    item.append(image, remove);
    return item;
  });
  byId("inputs").replaceChildren(...shown);
  byId("drop-hint").hidden = inputs.length > 0;
  byId("image").required = model.editing.needs_image && !inputs.length;
  byId("strength-field").hidden = !inputs.length || model.editing.default_strength === null;
  showSizes();
}

function showStrength() {
  byId("strength-value").textContent = `${Math.round(100 * byId("strength").value)} %`;
}

function allows(info, width, height) {
  const pixels = width * height;
  return Math.max(width, height) <= info.max_side && pixels >= info.min_pixels && pixels <= info.max_pixels;
}

/** The sizes that the model allows, by aspect ratio. */
function showSizes() {
  const multiple = model.size_multiple;
  const select = byId("size");
  const before = select.value || FIRST;
  const groups = Object.entries(ASPECTS).map(([label, [across, down]]) => {
    const group = document.createElement("optgroup");
    group.label = label;
    for (const side of AREAS) {
      const fit = (share) => Math.max(1, Math.round((side * share) / multiple)) * multiple;
      const [width, height] = [fit(Math.sqrt(across / down)), fit(Math.sqrt(down / across))];
      if (allows(model, width, height)) group.append(new Option(`${width}x${height}`));
    }
    return group;
  });
  select.replaceChildren(...groups.filter((group) => group.children.length));
  if (inputs.length) select.prepend(new Option("like the picture", LIKE_INPUT));
  const values = [...select.options].map((option) => option.value);
  select.value = inputs.length && before === FIRST ? LIKE_INPUT : [before, FIRST].find((one) => values.includes(one)) ?? values[0];
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
    strength: byId("strength-field").hidden ? undefined : number("strength"),
    stream: true,
    partial_images: 3,
    progress: true,
  };
}
