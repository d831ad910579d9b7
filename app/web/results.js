/** The results of an image: labels, times, curl commands and feature maps. */

import { $, context2d, element } from "./dom.js";
import { drawComponents, drawHeat, magnitude, principalComponents } from "./feature_maps.js";
import { apiKey } from "./service.js";

/** @typedef {{blob: Blob, name: string}} NamedImage */

const TIME_STAGES = ["decode", "queue", "compute", "encode", "other"]; // of the time that a request takes

/** @param {number} score */
const percent = (score) => `${(100 * score).toFixed(1)} %`;

/** @param {import("./service.js").Prediction[]} predictions */
export function showLabels(predictions) {
  $("labels").replaceChildren(...predictions.map(({ label, score }) => {
    const bar = element("span");
    bar.style.width = `${100 * score}%`;
    return element("li", {}, element("span", { textContent: label }),
      element("span", { textContent: percent(score) }), element("span", { className: "track" }, bar));
  }));
  $("announcement").textContent = `${predictions[0].label}, ${percent(predictions[0].score)}`;
  $("result-section").hidden = false;
}

/**
 * @param {import("./service.js").Times} measured
 * @param {number} roundTrip milliseconds
 */
export function showTimes({ total, ...measured }, roundTrip) {
  /** @type {import("./service.js").Times} */
  const times = { ...measured, other: Math.max(0, total - Object.values(measured).reduce((sum, time) => sum + time, 0)) };
  const stages = TIME_STAGES.filter((stage) => stage in times);
  $("time-bar").replaceChildren(...stages.map((stage) => {
    const bar = element("span", { className: stage });
    bar.style.width = `${100 * times[stage] / total}%`;
    return bar;
  }));
  /**
   * @param {string} name
   * @param {number} time
   */
  const entry = (name, time, className = "") => element("div", {},
    element("dt", { className, textContent: name }), element("dd", { textContent: `${time.toFixed(1)} ms` }));
  $("times").replaceChildren(...stages.map((stage) => entry(stage, times[stage], stage)),
    entry("total in the service", total), entry("round trip", roundTrip));
}

/**
 * Show the curl command of a request, in place of an earlier one to the same endpoint.
 * @param {NamedImage} image
 * @param {string} path
 * @param {string} output file that curl writes
 */
export function showCommand(image, path, output = "") {
  const endpoint = path.split("?")[0];
  /** @param {string} word */
  const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;
  const command = ["curl", "--data-binary", quoted(`@${image.name}`),
    ...(apiKey() ? ["-H", '"X-API-Key: $KEY"'] : []),
    ...(output ? ["-H", "'Accept: application/vnd.safetensors'", "-o", output] : []),
    quoted(new URL(path, document.baseURI).href)].join(" ");
  const code = element("code", { textContent: command });
  const copy = element("button", { textContent: "Copy" });
  copy.setAttribute("aria-label", `Copy the command for /${endpoint}`);
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      copy.textContent = "Copied";
    } catch {
      getSelection()?.selectAllChildren(code); // browsers only allow copying on localhost and https://
      copy.textContent = "Press Ctrl+C";
    }
  });
  const item = element("li", {}, code, copy);
  item.dataset.endpoint = endpoint;
  const previous = $("commands").querySelector(`[data-endpoint="${endpoint}"]`);
  if (previous) previous.replaceWith(item);
  else $("commands").append(item);
}

/**
 * Offer to save an image that is not a file yet (drawn, pasted, captured, a sample), under the name in the curl commands.
 * @param {NamedImage} image
 */
export function showSave({ blob, name }) {
  const previous = $("save").querySelector("a");
  if (previous) URL.revokeObjectURL(previous.href);
  $("save").replaceChildren();
  if (blob instanceof File && blob.name) return;
  $("save").append(element("a", { textContent: `Save ${name}`, download: name, href: URL.createObjectURL(blob) }));
}

/** @param {[string, import("./service.js").FeatureMap][]} featureMaps name and feature map of each stage */
export function showFeatureMaps(featureMaps) {
  $("feature-maps").replaceChildren(...featureMaps.map(([name, featureMap]) => {
    const [channels, height, width] = featureMap.shape;
    const shape = `${channels} channels, ${height}×${width}`;
    const [heatMap, components] = [element("canvas"), element("canvas")];
    const [minimum, maximum] = drawHeat(heatMap, magnitude(featureMap), height, width);
    drawComponents(components, principalComponents(featureMap), height, width);
    return element("figure", {}, element("div", {},
      tile(heatMap, `${name}, magnitude`,
        `Mean magnitude of ${shape}: ${minimum.toPrecision(3)} (dark) to ${maximum.toPrecision(3)} (bright).`),
      tile(components, `${name}, principal components`,
        `First three principal components of ${shape}, as red, green and blue.`)),
    element("figcaption", { textContent: `${name}: ${shape}` }));
  }));
  $("feature-maps-section").hidden = false;
}

/**
 * Return a button that shows a feature map enlarged.
 * @param {HTMLCanvasElement} canvas
 * @param {string} title
 * @param {string} text
 */
function tile(canvas, title, text) {
  const button = element("button", { title }, canvas);
  button.setAttribute("aria-label", `${title}, enlarge`);
  button.addEventListener("click", () => {
    const large = $("large-map", HTMLCanvasElement);
    [large.width, large.height] = [canvas.width, canvas.height];
    context2d(large).drawImage(canvas, 0, 0);
    $("large-title").textContent = title;
    $("large-text").textContent = text;
    $("large", HTMLDialogElement).showModal();
  });
  return button;
}
