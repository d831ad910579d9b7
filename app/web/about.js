/** What the page shows before the first image: the model, and sample images of labels that it has. */

import { $, context2d, element } from "./dom.js";
import { cropOf, pngOf, resizedSize } from "./images.js";

/** @typedef {import("./service.js").Model} Model */

const MAX_NAMED_LABELS = 10;
const SAMPLE_SIZE = 256; // pixels

/** [file in samples/, the label that it shows: of the digits, or of ImageNet] */
const SAMPLES = [
  ["7", "7"], ["3", "3"], ["0", "0"], ["5", "5"], ["2", "2"], ["8", "8"],
  ["daisy", "daisy"], ["clock", "analog clock"], ["traffic-light", "traffic light"], ["crossword", "crossword puzzle"],
];

/** @param {string} label of ImageNet: synonyms, separated by commas */
const firstName = (label) => label.split(",")[0];

/**
 * Show the description of the model.
 * @param {Model} model
 */
export function showModel(model) {
  const { labels, config } = model;
  const named = labels.length > MAX_NAMED_LABELS ? labels.slice(0, 5) : labels;
  const rest = labels.length > named.length ? ` and ${labels.length - named.length} more` : "";
  const dilations = config.dilations.flat();
  const facts = {
    Labels: `${labels.length}: ${named.map(firstName).join(", ")}${rest}`,
    Input: inputOf(model.input_size),
    Network: `${dilations.length} layers in ${config.depths.length} stages`,
    Neighborhood: `${config.kernel_size}×${config.kernel_size} keys, dilation ${range(dilations)}`,
    Runtime: `${model.runtime} on ${model.device}, ${model.precision}`,
    Attention: [...new Set(Object.values(model.attention))].join(", "),
    Disabled: model.disabled.map(({ name, reason }) => `${name}: ${reason}`).join("; "),
  };
  $("model").textContent = model.model;
  document.title = `DiNAT: ${model.model}`;
  $("model-facts").replaceChildren(...Object.entries(facts).filter(([, text]) => text).map(([name, text]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text }))));
  $("model-facts").hidden = false;
}

/** @param {number[]} numbers */
function range(numbers) {
  const [minimum, maximum] = [Math.min(...numbers), Math.max(...numbers)];
  return minimum === maximum ? `${minimum}` : `${minimum} to ${maximum}`;
}

/** @param {import("./service.js").ImageProcessor} processor */
function inputOf(processor) {
  const crop = cropOf(processor);
  if (crop) return `${crop[1]}×${crop[0]} pixels from the center of the image`;
  if (!processor.do_resize) return "images of any size";
  if (processor.size.shortest_edge) return `shorter side ${processor.size.shortest_edge} pixels`;
  const [height, width] = resizedSize(processor, 1, 1);
  return `${width}×${height} pixels`;
}

/**
 * Offer samples of labels that the model has.
 * @param {Model} model
 * @param {import("./images.js").OnImage} onImage
 */
export function showSamples({ labels }, onImage) {
  const names = new Set(labels.map(firstName));
  const samples = SAMPLES.filter(([, label]) => names.has(label));
  $("samples").replaceChildren(...samples.map(([file, label]) => {
    const image = element("img", { src: `web/samples/${file}.svg`, alt: `Sample: ${label}`, width: SAMPLE_SIZE, height: SAMPLE_SIZE });
    const button = element("button", { title: label }, image);
    button.addEventListener("click", async () => onImage(await rasterized(image), `${file}.png`));
    return button;
  }));
  $("samples-panel").hidden = samples.length === 0;
}

/**
 * Return a drawing as PNG: the service reads no SVG.
 * @param {HTMLImageElement} image
 */
async function rasterized(image) {
  await image.decode();
  const canvas = element("canvas", { width: SAMPLE_SIZE, height: SAMPLE_SIZE });
  context2d(canvas).drawImage(image, 0, 0, SAMPLE_SIZE, SAMPLE_SIZE);
  return pngOf(canvas);
}
