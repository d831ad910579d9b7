/** The page: one picture at a time, what the service says of it, and what the network sees in it. */

import { drawComponents, drawHeat, magnitude, principalComponents } from "./maps.js";
import { describe, drawNeighborhood } from "./neighborhoods.js";
import { listen, seenPart } from "./pictures.js";
import * as service from "./service.js";

const $ = (id) => document.getElementById(id);
const VIEW = 640; // the longer side of the view, in pixels of its canvas
const TILE = 128;
const PARTS = ["decode", "queue", "compute", "encode", "other"];

let served = null; // what GET /model says
let current = null; // {blob, name, bitmap, point, layers, cells}: the picture
let chosen = 0; // the layer that is shown on the picture

/** An element, its properties, and what is in it. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(words) {
  $("error").textContent = words;
  $("error").hidden = !words;
}

/** Say what went wrong; ask for a key where that is it. */
function sayWhy(error) {
  say(error.message[0].toUpperCase() + error.message.slice(1));
  $("key-form").hidden = error.status !== 401;
}

/** Wait until pictures are taken, then know what is served. */
async function begin() {
  for (;;) {
    const { status, detail } = await service.health();
    $("status").textContent = status === "ready" ? "ready" : detail;
    if (status === "ready") break;
    if (status === "failed") throw new Error(detail);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  served = await service.model();
  const { model, runtime, device, precision, labels } = served;
  $("model").textContent = `${model}: ${labels.length} labels, ${runtime} on ${device} in ${precision}`;
  document.title = `DiNAT: ${model}`;
  if (current) await show(current.blob, current.name);
}

/** A new picture: classify it, then show what is in the network. */
async function show(blob, name) {
  const mine = (current = { blob, name, bitmap: null, point: { y: 0.5, x: 0.5 }, layers: [], cells: new Map() });
  if (!served) return; // begin comes back to it
  say("");
  $("commands").replaceChildren();
  try {
    mine.bitmap = await createImageBitmap(blob).catch(() => null); // the service may read what this browser does not
    const answer = await service.classify(blob, Math.min(5, served.labels.length));
    if (mine !== current) return;
    showLabels(answer.predictions);
    showTimes(answer);
    showCommand(`classify?top_k=${answer.predictions.length}`);
    showPicture();
    const stages = served.features.filter((one) => /^(stem|stage\d+)$/.test(one));
    const maps = await service.features(blob, stages);
    if (mine !== current) return;
    showMaps(stages.map((stage) => [stage, maps[stage]]));
    showCommand(`features?features=${stages.join(",")}`, "maps.safetensors");
    await look(mine.point);
  } catch (error) {
    if (mine !== current) return;
    forget();
    sayWhy(error);
  }
}

/** Nothing of an earlier picture stands beside an error. */
function forget() {
  $("labels").replaceChildren();
  for (const id of ["told", "view", "caption", "maps-section", "layers-section"]) $(id).hidden = true;
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

function showTimes({ times: { total, ...parts }, milliseconds }) {
  const known = { ...parts, other: Math.max(0, total - Object.values(parts).reduce((sum, one) => sum + one, 0)) };
  const shown = PARTS.filter((part) => part in known);
  $("time-bar").replaceChildren(...shown.map((part) => {
    const bar = element("span", { className: part });
    bar.style.width = `${100 * known[part] / total}%`;
    return bar;
  }));
  const entry = (name, ms, className = "") => element("div", {},
    element("dt", { className, textContent: name }), element("dd", { textContent: `${ms.toFixed(1)} ms` }));
  $("times").replaceChildren(...shown.map((part) => entry(part, known[part], part)),
    entry("in the service", total), entry("and the way there and back", milliseconds));
  $("told").hidden = false;
}

/** The curl line of what was just done, in the place of an earlier one of that door. */
function showCommand(path, output = "") {
  const door = path.split("?")[0];
  const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;
  const line = ["curl", "--data-binary", quoted(`@${current.name}`),
    ...(service.hasKey() ? ["-H", '"X-API-Key: $KEY"'] : []),
    ...(output ? ["-H", "'Accept: application/vnd.safetensors'", "-o", output] : []),
    quoted(new URL(path, document.baseURI).href)].join(" ");
  const copy = element("button", { textContent: "Copy" });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(line);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(copy.previousSibling); // a page that is not from localhost or https:// may not copy
      copy.textContent = "Press Ctrl+C";
    }
  });
  const shown = element("li", {}, element("code", { textContent: line }), copy);
  shown.dataset.door = door;
  const old = $("commands").querySelector(`[data-door="${door}"]`);
  if (old) old.replaceWith(shown);
  else $("commands").append(shown);
  showSave();
}

/** What was drawn, pasted or taken is in no folder yet: it can be saved under the name that the curl line has. */
function showSave() {
  URL.revokeObjectURL($("save").firstElementChild?.href);
  $("save").replaceChildren();
  if (current.blob instanceof File && current.blob.name) return;
  const link = element("a", { textContent: `Save ${current.name}`, download: current.name, href: URL.createObjectURL(current.blob) });
  $("save").append(link);
}

/** Draw the part of the picture that the network sees into a canvas, over white as the service does. */
function drawPicture(canvas, longer) {
  const { bitmap } = current;
  const part = bitmap && seenPart(served.input_size, bitmap.width, bitmap.height);
  const scale = longer / (part ? Math.max(part.width, part.height) : longer);
  [canvas.width, canvas.height] = part ? [Math.round(part.width * scale), Math.round(part.height * scale)] : [longer, longer];
  const context = canvas.getContext("2d");
  context.fillStyle = bitmap ? "#fff" : "#777";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (part) context.drawImage(bitmap, part.x, part.y, part.width, part.height, 0, 0, canvas.width, canvas.height);
}

function showPicture() {
  drawPicture($("view"), VIEW);
  const { bitmap, blob, name } = current;
  const size = bitmap ? `${bitmap.width}×${bitmap.height}` : "which this browser cannot show";
  $("caption").textContent = `${name}, ${size}, ${(blob.size / 1000).toFixed(1)} kB`;
  for (const id of ["view", "caption"]) $(id).hidden = false;
  $("invitation").hidden = true;
}

function showMaps(maps) {
  $("maps").replaceChildren(...maps.map(([name, map]) => {
    const [channels, height, width] = map.shape;
    const of = `${channels} channels, ${height}×${width}`;
    const [heatMap, colours] = [element("canvas"), element("canvas")];
    const [least, largest] = drawHeat(heatMap, magnitude(map), height, width);
    drawComponents(colours, principalComponents(map), height, width);
    const tile = (canvas, what, words) => {
      const button = element("button", { title: what }, canvas);
      button.setAttribute("aria-label", `${what}, large`);
      button.addEventListener("click", () => showLarge(canvas, what, words));
      return button;
    };
    return element("figure", {}, element("div", {},
      tile(heatMap, `${name}, magnitude`, `The mean magnitude of ${of}: ${least.toPrecision(3)} (dark) to ${largest.toPrecision(3)} (bright).`),
      tile(colours, `${name}, principal components`, `Three principal components of ${of}, as red, green and blue.`)),
    element("figcaption", { textContent: `${name}: ${of}` }));
  }));
  $("maps-section").hidden = false;
}

function showLarge(canvas, title, words) {
  const large = $("large-map");
  [large.width, large.height] = [canvas.width, canvas.height];
  large.getContext("2d").drawImage(canvas, 0, 0);
  $("large-title").textContent = title;
  $("large-text").textContent = words;
  $("large").showModal();
}

let wanted = null; // the last point that was asked for while another was on its way
let looking = false;

/** What the point of the picture sees, once the service has said it. Of points that follow each other fast only the last is asked. */
async function look(point) {
  current.point = point;
  wanted = point;
  if (looking) return;
  looking = true;
  try {
    while (wanted) {
      const [mine, place] = [current, wanted];
      wanted = null;
      const layers = mine.cells.get(cell(mine, place)) ?? (await service.attention(mine.blob, place));
      if (mine !== current) continue;
      mine.layers = layers;
      mine.cells.set(cell(mine, place), layers);
      showCommand(service.attentionPath(place));
      showLayers();
    }
  } catch (error) {
    sayWhy(error);
  } finally {
    looking = false;
  }
}

/** Points of one cell of the finest map see the same. */
function cell({ layers }, { y, x }) {
  if (!layers.length) return "";
  const [height, width] = layers[0].size;
  return `${Math.min(Math.floor(y * height), height - 1)},${Math.min(Math.floor(x * width), width - 1)}`;
}

function showLayers() {
  const { layers } = current;
  chosen = Math.min(chosen, layers.length - 1);
  if ($("layers").childElementCount !== layers.length) {
    $("layers").replaceChildren(...layers.map((_, i) => {
      const button = element("button", {}, element("canvas"), element("span"));
      button.addEventListener("click", () => {
        chosen = i;
        showLayers();
      });
      return button;
    }));
  }
  const heads = layers[chosen].weights.length;
  if ($("head").childElementCount !== heads + 1) {
    $("head").replaceChildren(element("option", { value: "", textContent: "all heads, their mean" }),
      ...Array.from({ length: heads }, (_, i) => element("option", { value: i, textContent: `head ${i + 1}` })));
  }
  const head = $("head").value === "" ? null : Number($("head").value);
  const tile = element("canvas");
  drawPicture(tile, TILE);
  layers.forEach((layer, i) => {
    const button = $("layers").children[i];
    const [canvas, words] = button.children;
    [canvas.width, canvas.height] = [tile.width, tile.height];
    canvas.getContext("2d").drawImage(tile, 0, 0);
    drawNeighborhood(canvas, layer, head);
    words.textContent = `${layer.stage}.${layer.layer}, dilation ${layer.dilation}`;
    button.setAttribute("aria-label", describe(layer));
    button.setAttribute("aria-pressed", String(i === chosen));
  });
  drawPicture($("view"), VIEW);
  drawNeighborhood($("view"), layers[chosen], head);
  $("view").setAttribute("aria-label", `The picture as the network sees it. Arrow keys move the point. ${describe(layers[chosen])}`);
  $("layers-section").hidden = false;
}

/** 0 to 1 in the view, where the pointer is. */
function place(event) {
  const { clientWidth, clientHeight } = $("view");
  const within = (value) => Math.min(Math.max(value, 0), 1);
  return { y: within(event.offsetY / clientHeight), x: within(event.offsetX / clientWidth) };
}

/** The middle of the neighboring cell of the chosen layer's map. */
function step(key) {
  const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key] ?? [0, 0];
  if (!down && !across) return null;
  const { size, query } = current.layers[chosen];
  const [row, column] = [query[0] + down, query[1] + across].map((at, i) => Math.min(Math.max(at, 0), size[i] - 1));
  return { y: (row + 0.5) / size[0], x: (column + 0.5) / size[1] };
}

$("view").addEventListener("pointermove", (event) => current.layers.length && look(place(event)));
$("view").addEventListener("click", (event) => current.layers.length && look(place(event)));
$("view").addEventListener("keydown", (event) => {
  const to = current.layers.length ? step(event.key) : null;
  if (!to) return;
  event.preventDefault();
  look(to);
});
$("head").addEventListener("change", showLayers);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.useKey($("key").value);
  $("key-form").hidden = true;
  say("");
  begin().catch(sayWhy);
});
listen(show, say);
begin().catch((error) => {
  $("status").textContent = "";
  sayWhy(error);
});
