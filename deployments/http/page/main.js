// The page: the form on one side, the live board and what was made on the other.

import { ask, keys } from "./client.js";
import { addInput, setModel, startForm } from "./form.js";
import { startGallery } from "./gallery.js";
import { startBoard } from "./live.js";

const RETRY_MS = 2000;

/** What the model can make, for the form; asked until the server knows it. */
async function showModel() {
  try {
    const info = await (await ask("v1/model_info")).json();
    setModel(info);
    if (!shown) startGallery(info.editing.max_images ? addInput : null);
    shown = true;
  } catch (error) {
    if (error.status !== 401) setTimeout(showModel, RETRY_MS);
  }
}

let shown = false;
startForm();
startBoard();
showModel();
keys.addEventListener("changed", showModel);
