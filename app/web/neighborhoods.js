/** Drawing of the neighborhood of a query over the image. */

import { context2d } from "./dom.js";
import { heat } from "./feature_maps.js";

/** @typedef {import("./service.js").Layer} Layer */

/**
 * Return the attention weights of one head, or their mean over all heads if `head` is null, as a list of rows.
 * @param {Layer} layer
 * @param {number | null} head
 */
export function weightsOf(layer, head) {
  if (head !== null && head < layer.weights.length) return layer.weights[head];
  return layer.rows.map((_, i) =>
    layer.columns.map((_, j) => layer.weights.reduce((sum, weights) => sum + weights[i][j], 0) / layer.weights.length));
}

/**
 * Draw the keys of the query, colored by their weights relative to the largest one. Padding is not drawn.
 * @param {HTMLCanvasElement} canvas
 * @param {Layer} layer
 * @param {number | null} head
 */
export function drawNeighborhood(canvas, layer, head) {
  const context = context2d(canvas);
  const [height, width] = layer.size;
  const [down, across] = [canvas.height / height, canvas.width / width];
  const weights = weightsOf(layer, head);
  const maximum = Math.max(...weights.flat());
  context.fillStyle = "rgb(0 0 0 / 45%)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  layer.rows.forEach((row, i) => layer.columns.forEach((column, j) => {
    if (row >= height || column >= width) return;
    const [red, green, blue] = heat(0.15 + 0.85 * weights[i][j] / maximum);
    context.fillStyle = `rgb(${red} ${green} ${blue} / 80%)`;
    context.fillRect(column * across, row * down, Math.max(1, across - 1), Math.max(1, down - 1));
  }));
  context.strokeStyle = "#fff";
  context.lineWidth = Math.max(1.5, canvas.width / 200);
  context.strokeRect(layer.query[1] * across, layer.query[0] * down, across, down);
}

/**
 * Describe a layer in text, for assistive technology.
 * @param {Layer} layer
 */
export function describe(layer) {
  const [height, width] = layer.size;
  const inside = layer.rows.filter((row) => row < height).length * layer.columns.filter((column) => column < width).length;
  return `stage ${layer.stage}, layer ${layer.layer}, dilation ${layer.dilation}: ${inside} keys of a ${height}×${width} feature map`;
}
