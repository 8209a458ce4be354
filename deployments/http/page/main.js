// The page: the form on one side, the live board on the other.

import { ask, keys } from "./client.js";
import { startForm } from "./form.js";
import { startBoard } from "./live.js";

const RETRY_MS = 2000;

/** What the model can make, for the form; asked until the server knows it. */
async function showModel() {
  try {
    const info = await (await ask("v1/model_info")).json();
    document.getElementById("model").textContent = info.name;
    document.getElementById("steps").max = info.max_steps;
    document.getElementById("steps").placeholder = info.default_steps;
    for (const option of document.querySelectorAll("#size option")) {
      const [width, height] = option.value.split("x").map(Number);
      const pixels = width * height;
      option.hidden = option.disabled =
        Math.max(width, height) > info.max_side ||
        width % info.size_multiple !== 0 ||
        height % info.size_multiple !== 0 ||
        pixels < info.min_pixels ||
        pixels > info.max_pixels;
    }
    const size = document.getElementById("size");
    if (size.selectedOptions[0]?.disabled) size.value = size.querySelector("option:enabled")?.value;
  } catch (error) {
    if (error.status !== 401) setTimeout(showModel, RETRY_MS);
  }
}

startForm();
startBoard();
showModel();
keys.addEventListener("changed", showModel);
