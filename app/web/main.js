/** The page: classifies one image at a time and shows its labels, feature maps and attention. */

import { showModel, showSamples } from "./about.js";
import { $, context2d, element } from "./dom.js";
import { ARROWS, listen, visibleRegion } from "./images.js";
import { describe, drawNeighborhood } from "./neighborhoods.js";
import { showCommand, showFeatureMaps, showLabels, showSave, showTimes } from "./results.js";
import * as service from "./service.js";

/**
 * @typedef {service.Model} Model
 * @typedef {service.Point} Point
 * @typedef {service.Layer} Layer
 *
 * The image that is shown: layers are the neighborhoods of the point, cells those of every cell that was requested.
 * @typedef {{blob: Blob, name: string, bitmap: ImageBitmap | null, layers: Layer[], cells: Map<string, Layer[]>}} Shown
 */

const VIEW = 640; // longer side of the view, in pixels of its canvas
const TILE = 128; // longer side of a layer's tile
const CENTER = { y: 0.5, x: 0.5 };

const view = $("view", HTMLCanvasElement);
const heads = $("head", HTMLSelectElement);

const state = {
  model: /** @type {Model | null} */ (null), // null until the service is ready
  image: /** @type {Shown | null} */ (null),
  layer: 0, // index of the layer that is drawn over the image
  pendingPoint: /** @type {Point | null} */ (null), // latest point that was selected while a request was in flight
  requesting: false, // neighborhoods
};

/** @param {string} text */
function showMessage(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/**
 * Show an error, and the form for the API key if the service requires one.
 * @param {unknown} error
 */
function showError(error) {
  const message = error instanceof Error ? error.message : String(error);
  showMessage(message.charAt(0).toUpperCase() + message.slice(1));
  $("key-form").hidden = !(error instanceof service.ServiceError && error.status === 401);
}

/** Wait until the service is ready, then load the model's description. */
async function connect() {
  for (;;) {
    const { status, detail } = await service.health();
    $("status").textContent = status === "ready" ? "ready" : detail;
    if (status === "ready") break;
    if (status === "failed") throw new Error(detail);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  state.model = await service.model();
  showModel(state.model);
  showSamples(state.model, showImage);
  if (state.image) await showImage(state.image.blob, state.image.name);
}

/**
 * Classify a new image and show everything about it.
 * @param {Blob} blob
 * @param {string} name
 */
async function showImage(blob, name) {
  /** @type {Shown} */
  const image = (state.image = { blob, name, bitmap: null, layers: [], cells: new Map() });
  const { model } = state;
  if (!model) return; // connect shows the image later
  showMessage("");
  $("drop").setAttribute("aria-busy", "true");
  try {
    image.bitmap = await createImageBitmap(blob).catch(() => null); // the service supports formats that browsers do not
    const { predictions, times, milliseconds } = await service.classify(blob, Math.min(5, model.labels.length));
    if (image !== state.image) return;
    $("commands").replaceChildren();
    showLabels(predictions);
    showTimes(times, milliseconds);
    showCommand(image, `classify?top_k=${predictions.length}`);
    showSave(image);
    showView(image, model);
    const stages = model.features.filter((name) => /^(stem|stage\d+)$/.test(name));
    const featureMaps = await service.features(blob, stages);
    if (image !== state.image) return;
    showFeatureMaps(stages.map((stage) => [stage, featureMaps[stage]]));
    showCommand(image, `features?features=${stages.join(",")}`, "features.safetensors");
    await showPoint(CENTER);
  } catch (error) {
    if (image !== state.image) return;
    clearResults();
    showError(error);
  } finally {
    if (image === state.image) $("drop").removeAttribute("aria-busy");
  }
}

/**
 * Hide an image and its results, unless another one is shown.
 * @param {Blob} blob
 */
function removeImage(blob) {
  if (state.image?.blob !== blob) return;
  state.image = null;
  $("drop").removeAttribute("aria-busy");
  clearResults();
}

/** Hide the results of an earlier image, so that none are shown beside an error. */
function clearResults() {
  $("labels").replaceChildren();
  $("caption").textContent = ""; // a hidden caption would still name the figure
  for (const id of ["result-section", "view", "caption", "feature-maps-section", "layers-section"]) $(id).hidden = true;
  $("invitation").hidden = false;
}

/**
 * Draw the part of the image that the network receives, over white as in the service.
 * @param {HTMLCanvasElement} canvas
 * @param {number} longerSide
 * @param {Shown} image
 * @param {Model} model
 */
function drawImage(canvas, longerSide, { bitmap }, model) {
  const region = bitmap && visibleRegion(model.input_size, bitmap.width, bitmap.height);
  const scale = longerSide / (region ? Math.max(region.width, region.height) : longerSide);
  [canvas.width, canvas.height] = region
    ? [Math.round(region.width * scale), Math.round(region.height * scale)] : [longerSide, longerSide];
  const context = context2d(canvas);
  context.fillStyle = bitmap ? "#fff" : "#777";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (!bitmap || !region) return;
  context.drawImage(bitmap, region.x, region.y, region.width, region.height, 0, 0, canvas.width, canvas.height);
}

/**
 * @param {Shown} image
 * @param {Model} model
 */
function showView(image, model) {
  drawImage(view, VIEW, image, model);
  view.setAttribute("aria-disabled", "true"); // until its neighborhoods are known
  const { bitmap, blob, name } = image;
  const size = bitmap ? `${bitmap.width}×${bitmap.height}` : "not supported by this browser";
  $("caption").textContent = `${name}, ${size}, ${(blob.size / 1000).toFixed(1)} kB`;
  for (const id of ["view", "caption"]) $(id).hidden = false;
  $("invitation").hidden = true;
}

/**
 * Request and show the neighborhoods of a point. While a request is in flight, only the latest point is remembered.
 * @param {Point} point
 */
async function showPoint(point) {
  state.pendingPoint = point;
  if (state.requesting) return;
  state.requesting = true;
  try {
    while (state.pendingPoint && state.image) {
      const { image, pendingPoint: requested } = state;
      state.pendingPoint = null;
      const layers = image.cells.get(cell(image, requested)) ?? (await service.attention(image.blob, requested));
      if (image !== state.image) continue;
      image.layers = layers;
      image.cells.set(cell(image, requested), layers);
      showCommand(image, service.attentionPath(requested));
      showLayers();
    }
  } catch (error) {
    showError(error);
  } finally {
    state.requesting = false;
  }
}

/**
 * Return the cell of the largest feature map that contains a point. All points of a cell have the same neighborhoods.
 * @param {Shown} image
 * @param {Point} point
 */
function cell({ layers }, { y, x }) {
  if (!layers.length) return "";
  const [height, width] = layers[0].size;
  return `${Math.min(Math.floor(y * height), height - 1)},${Math.min(Math.floor(x * width), width - 1)}`;
}

/** Show the neighborhoods of the point: one tile a layer, and the selected layer over the image. */
function showLayers() {
  const { image, model } = state;
  if (!image?.layers.length || !model) return;
  const { layers } = image;
  state.layer = Math.min(state.layer, layers.length - 1);
  const selected = layers[state.layer];
  const head = selectedHead(selected.weights.length);
  const tile = element("canvas");
  drawImage(tile, TILE, image, model);
  const tiles = layerTiles(layers.length);
  layers.forEach((layer, i) => {
    const { button, canvas, caption } = tiles[i];
    [canvas.width, canvas.height] = [tile.width, tile.height];
    context2d(canvas).drawImage(tile, 0, 0);
    drawNeighborhood(canvas, layer, head);
    caption.textContent = `${layer.stage}.${layer.layer}, dilation ${layer.dilation}`;
    button.title = describe(layer);
    button.setAttribute("aria-pressed", String(i === state.layer));
  });
  drawImage(view, VIEW, image, model);
  drawNeighborhood(view, selected, head);
  showValue(selected);
  $("layers-section").hidden = false;
}

/**
 * Return the parts of every layer's tile, created if the number of layers changed.
 * @param {number} count
 */
function layerTiles(count) {
  if ($("layers").childElementCount !== count) {
    $("layers").replaceChildren(...Array.from({ length: count }, (_, i) => {
      const button = element("button", {}, element("canvas"), element("span"));
      button.addEventListener("click", () => {
        state.layer = i;
        showLayers();
      });
      return button;
    }));
  }
  return [...$("layers").children].map((button) => ({
    button: /** @type {HTMLButtonElement} */ (button),
    canvas: /** @type {HTMLCanvasElement} */ (button.children[0]),
    caption: button.children[1],
  }));
}

/**
 * Return the index of the selected head, null for the mean of all.
 * @param {number} count number of heads in the selected layer
 */
function selectedHead(count) {
  if (heads.childElementCount !== count + 1) {
    heads.replaceChildren(element("option", { value: "", textContent: "all heads (mean)" }),
      ...Array.from({ length: count }, (_, i) => element("option", { value: String(i), textContent: `head ${i + 1}` })));
  }
  return heads.value === "" ? null : Number(heads.value);
}

/**
 * Set the value of the view for assistive technology: the number of the cell, and what it is.
 * @param {Layer} layer
 */
function showValue(layer) {
  const { size: [height, width], query: [row, column] } = layer;
  view.setAttribute("aria-valuemax", String(height * width));
  view.setAttribute("aria-valuenow", String(row * width + column + 1));
  view.setAttribute("aria-valuetext", `row ${row + 1}, column ${column + 1}; ${describe(layer)}`);
  view.removeAttribute("aria-disabled");
}

/**
 * Return the position of the pointer in the view.
 * @param {MouseEvent} event
 * @returns {Point}
 */
function pointAt({ offsetX, offsetY }) {
  /** @param {number} value */
  const clamp = (value) => Math.min(Math.max(value, 0), 1);
  return { y: clamp(offsetY / view.clientHeight), x: clamp(offsetX / view.clientWidth) };
}

/**
 * Return the center of the cell of the selected layer to which a key moves the point, null for other keys.
 * @param {string} key
 * @param {Layer} layer
 */
function neighborOf(key, { size, query }) {
  const ends = { Home: [-Infinity, -Infinity], End: [Infinity, Infinity] };
  const step = ARROWS[key] ?? ends[/** @type {keyof typeof ends} */ (key)];
  if (!step) return null;
  const [row, column] = step.map((cells, i) => Math.min(Math.max(query[i] + cells, 0), size[i] - 1));
  return { y: (row + 0.5) / size[0], x: (column + 0.5) / size[1] };
}

for (const type of /** @type {const} */ (["pointermove", "click"])) {
  view.addEventListener(type, (event) => state.image?.layers.length && showPoint(pointAt(event)));
}
view.addEventListener("keydown", (event) => {
  const point = state.image?.layers.length ? neighborOf(event.key, state.image.layers[state.layer]) : null;
  if (!point) return;
  event.preventDefault();
  showPoint(point);
});
heads.addEventListener("change", showLayers);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.setKey($("key", HTMLInputElement).value);
  $("key-form").hidden = true;
  showMessage("");
  connect().catch(showError);
});
listen(showImage, showMessage, removeImage);
connect().catch((error) => {
  $("status").textContent = "";
  showError(error);
});
