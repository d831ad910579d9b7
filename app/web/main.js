/** The page: classifies one image at a time and shows its labels, feature maps and attention. */

import { drawComponents, drawHeat, magnitude, principalComponents } from "./feature_maps.js";
import { listen, visibleRegion } from "./images.js";
import { describe, drawNeighborhood } from "./neighborhoods.js";
import * as service from "./service.js";

const $ = (id) => document.getElementById(id);
const VIEW = 640; // longer side of the view, in pixels of its canvas
const TILE = 128; // longer side of a layer's tile
const TIME_STAGES = ["decode", "queue", "compute", "encode", "other"]; // of the time that a request takes

let model = null; // response of GET /model
let current = null; // current image: {blob, name, bitmap, point, layers, cells}
let selectedLayer = 0; // index of the layer that is shown on the image

/** Create an element with properties and children. */
function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

function showMessage(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Show an error, and the form for the API key if the service requires one. */
function showError(error) {
  showMessage(error.message[0].toUpperCase() + error.message.slice(1));
  $("key-form").hidden = error.status !== 401;
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
  model = await service.model();
  const { model: name, runtime, device, precision, labels } = model;
  $("model").textContent = `${name}: ${labels.length} labels, ${runtime} on ${device} in ${precision}`;
  document.title = `DiNAT: ${name}`;
  if (current) await showImage(current.blob, current.name);
}

/** Classify a new image and show everything about it. */
async function showImage(blob, name) {
  const image = (current = { blob, name, bitmap: null, point: { y: 0.5, x: 0.5 }, layers: [], cells: new Map() });
  if (!model) return; // connect shows the image later
  showMessage("");
  $("commands").replaceChildren();
  try {
    image.bitmap = await createImageBitmap(blob).catch(() => null); // the service supports formats that browsers do not
    const result = await service.classify(blob, Math.min(5, model.labels.length));
    if (image !== current) return;
    showLabels(result.predictions);
    showTimes(result);
    showCommand(`classify?top_k=${result.predictions.length}`);
    showView();
    const stages = model.features.filter((name) => /^(stem|stage\d+)$/.test(name));
    const featureMaps = await service.features(blob, stages);
    if (image !== current) return;
    showFeatureMaps(stages.map((stage) => [stage, featureMaps[stage]]));
    showCommand(`features?features=${stages.join(",")}`, "features.safetensors");
    await showPoint(image.point);
  } catch (error) {
    if (image !== current) return;
    clearResults();
    showError(error);
  }
}

/** Hide the results of an earlier image, so that none are shown beside an error. */
function clearResults() {
  $("labels").replaceChildren();
  for (const id of ["details", "view", "caption", "feature-maps-section", "layers-section"]) $(id).hidden = true;
  $("invitation").hidden = false;
}

function showLabels(predictions) {
  $("labels").replaceChildren(...predictions.map(({ label, score }) => {
    const bar = element("span");
    bar.style.width = `${100 * score}%`;
    return element("li", {}, element("span", { textContent: label }),
      element("span", { textContent: `${(100 * score).toFixed(1)} %` }), element("span", { className: "track" }, bar));
  }));
}

function showTimes({ times: { total, ...measured }, milliseconds }) {
  const times = { ...measured, other: Math.max(0, total - Object.values(measured).reduce((sum, time) => sum + time, 0)) };
  const stages = TIME_STAGES.filter((stage) => stage in times);
  $("time-bar").replaceChildren(...stages.map((stage) => {
    const bar = element("span", { className: stage });
    bar.style.width = `${100 * times[stage] / total}%`;
    return bar;
  }));
  const entry = (name, time, className = "") => element("div", {},
    element("dt", { className, textContent: name }), element("dd", { textContent: `${time.toFixed(1)} ms` }));
  $("times").replaceChildren(...stages.map((stage) => entry(stage, times[stage], stage)),
    entry("total in the service", total), entry("round trip", milliseconds));
  $("details").hidden = false;
}

/** Show the curl command of a request, in place of an earlier one to the same endpoint. */
function showCommand(path, output = "") {
  const endpoint = path.split("?")[0];
  const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;
  const command = ["curl", "--data-binary", quoted(`@${current.name}`),
    ...(service.hasKey() ? ["-H", '"X-API-Key: $KEY"'] : []),
    ...(output ? ["-H", "'Accept: application/vnd.safetensors'", "-o", output] : []),
    quoted(new URL(path, document.baseURI).href)].join(" ");
  const copy = element("button", { textContent: "Copy" });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(copy.previousSibling); // browsers only allow copying on localhost and https://
      copy.textContent = "Press Ctrl+C";
    }
  });
  const item = element("li", {}, element("code", { textContent: command }), copy);
  item.dataset.endpoint = endpoint;
  const previous = $("commands").querySelector(`[data-endpoint="${endpoint}"]`);
  if (previous) previous.replaceWith(item);
  else $("commands").append(item);
  showSave();
}

/** Offer to save an image that is not a file yet (drawn, pasted or captured), under the name in the curl commands. */
function showSave() {
  URL.revokeObjectURL($("save").firstElementChild?.href);
  $("save").replaceChildren();
  if (current.blob instanceof File && current.blob.name) return;
  const href = URL.createObjectURL(current.blob);
  const link = element("a", { textContent: `Save ${current.name}`, download: current.name, href });
  $("save").append(link);
}

/** Draw the part of the image that the network receives, over white as in the service. */
function drawImage(canvas, longerSide) {
  const { bitmap } = current;
  const region = bitmap && visibleRegion(model.input_size, bitmap.width, bitmap.height);
  const scale = longerSide / (region ? Math.max(region.width, region.height) : longerSide);
  [canvas.width, canvas.height] = region
    ? [Math.round(region.width * scale), Math.round(region.height * scale)] : [longerSide, longerSide];
  const context = canvas.getContext("2d");
  context.fillStyle = bitmap ? "#fff" : "#777";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (region) context.drawImage(bitmap, region.x, region.y, region.width, region.height, 0, 0, canvas.width, canvas.height);
}

function showView() {
  drawImage($("view"), VIEW);
  const { bitmap, blob, name } = current;
  const size = bitmap ? `${bitmap.width}×${bitmap.height}` : "not supported by this browser";
  $("caption").textContent = `${name}, ${size}, ${(blob.size / 1000).toFixed(1)} kB`;
  for (const id of ["view", "caption"]) $(id).hidden = false;
  $("invitation").hidden = true;
}

function showFeatureMaps(featureMaps) {
  $("feature-maps").replaceChildren(...featureMaps.map(([name, featureMap]) => {
    const [channels, height, width] = featureMap.shape;
    const shape = `${channels} channels, ${height}×${width}`;
    const [heatMap, components] = [element("canvas"), element("canvas")];
    const [minimum, maximum] = drawHeat(heatMap, magnitude(featureMap), height, width);
    drawComponents(components, principalComponents(featureMap), height, width);
    const tile = (canvas, title, text) => {
      const button = element("button", { title }, canvas);
      button.setAttribute("aria-label", `${title}, enlarge`);
      button.addEventListener("click", () => showLarge(canvas, title, text));
      return button;
    };
    return element("figure", {}, element("div", {},
      tile(heatMap, `${name}, magnitude`,
        `Mean magnitude of ${shape}: ${minimum.toPrecision(3)} (dark) to ${maximum.toPrecision(3)} (bright).`),
      tile(components, `${name}, principal components`,
        `First three principal components of ${shape}, as red, green and blue.`)),
    element("figcaption", { textContent: `${name}: ${shape}` }));
  }));
  $("feature-maps-section").hidden = false;
}

function showLarge(canvas, title, text) {
  const large = $("large-map");
  [large.width, large.height] = [canvas.width, canvas.height];
  large.getContext("2d").drawImage(canvas, 0, 0);
  $("large-title").textContent = title;
  $("large-text").textContent = text;
  $("large").showModal();
}

let pendingPoint = null; // latest point that was selected while a request was in flight
let requesting = false;

/** Request and show the neighborhoods of a point. While a request is in flight, only the latest point is remembered. */
async function showPoint(point) {
  current.point = point;
  pendingPoint = point;
  if (requesting) return;
  requesting = true;
  try {
    while (pendingPoint) {
      const [image, requested] = [current, pendingPoint];
      pendingPoint = null;
      const layers = image.cells.get(cell(image, requested)) ?? (await service.attention(image.blob, requested));
      if (image !== current) continue;
      image.layers = layers;
      image.cells.set(cell(image, requested), layers);
      showCommand(service.attentionPath(requested));
      showLayers();
    }
  } catch (error) {
    showError(error);
  } finally {
    requesting = false;
  }
}

/** Return the cell of the largest feature map that contains a point. All points of a cell have the same neighborhoods. */
function cell({ layers }, { y, x }) {
  if (!layers.length) return "";
  const [height, width] = layers[0].size;
  return `${Math.min(Math.floor(y * height), height - 1)},${Math.min(Math.floor(x * width), width - 1)}`;
}

function showLayers() {
  const { layers } = current;
  selectedLayer = Math.min(selectedLayer, layers.length - 1);
  if ($("layers").childElementCount !== layers.length) {
    $("layers").replaceChildren(...layers.map((_, i) => {
      const button = element("button", {}, element("canvas"), element("span"));
      button.addEventListener("click", () => {
        selectedLayer = i;
        showLayers();
      });
      return button;
    }));
  }
  const heads = layers[selectedLayer].weights.length;
  if ($("head").childElementCount !== heads + 1) {
    $("head").replaceChildren(element("option", { value: "", textContent: "all heads (mean)" }),
      ...Array.from({ length: heads }, (_, i) => element("option", { value: i, textContent: `head ${i + 1}` })));
  }
  const head = $("head").value === "" ? null : Number($("head").value);
  const tile = element("canvas");
  drawImage(tile, TILE);
  layers.forEach((layer, i) => {
    const button = $("layers").children[i];
    const [canvas, caption] = button.children;
    [canvas.width, canvas.height] = [tile.width, tile.height];
    canvas.getContext("2d").drawImage(tile, 0, 0);
    drawNeighborhood(canvas, layer, head);
    caption.textContent = `${layer.stage}.${layer.layer}, dilation ${layer.dilation}`;
    button.setAttribute("aria-label", describe(layer));
    button.setAttribute("aria-pressed", String(i === selectedLayer));
  });
  drawImage($("view"), VIEW);
  drawNeighborhood($("view"), layers[selectedLayer], head);
  $("view").setAttribute("aria-label",
    `The part of the image that the network receives. Arrow keys move the point. ${describe(layers[selectedLayer])}`);
  $("layers-section").hidden = false;
}

/** Return the position of the pointer in the view, {y, x} from 0 to 1. */
function pointAt(event) {
  const { clientWidth, clientHeight } = $("view");
  const clamp = (value) => Math.min(Math.max(value, 0), 1);
  return { y: clamp(event.offsetY / clientHeight), x: clamp(event.offsetX / clientWidth) };
}

/** Return the center of the neighboring cell of the selected layer in the direction of an arrow key, null for other keys. */
function neighborOf(key) {
  const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key] ?? [0, 0];
  if (!down && !across) return null;
  const { size, query } = current.layers[selectedLayer];
  const [row, column] = [query[0] + down, query[1] + across].map((index, i) => Math.min(Math.max(index, 0), size[i] - 1));
  return { y: (row + 0.5) / size[0], x: (column + 0.5) / size[1] };
}

$("view").addEventListener("pointermove", (event) => current.layers.length && showPoint(pointAt(event)));
$("view").addEventListener("click", (event) => current.layers.length && showPoint(pointAt(event)));
$("view").addEventListener("keydown", (event) => {
  const point = current.layers.length ? neighborOf(event.key) : null;
  if (!point) return;
  event.preventDefault();
  showPoint(point);
});
$("head").addEventListener("change", showLayers);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.setKey($("key").value);
  $("key-form").hidden = true;
  showMessage("");
  connect().catch(showError);
});
listen(showImage, showMessage);
connect().catch((error) => {
  $("status").textContent = "";
  showError(error);
});
