/** What a query sees, drawn over the picture. A layer is what POST /attention says of it. */

import { heat } from "./maps.js";

/** The weights, one list for each row, of one head, or their mean over all heads if head is null. */
export function weightsOf(layer, head) {
  if (head !== null && head < layer.weights.length) return layer.weights[head];
  return layer.rows.map((_, i) =>
    layer.columns.map((_, j) => layer.weights.reduce((sum, one) => sum + one[i][j], 0) / layer.weights.length));
}

/** Draw the keys that the query sees, each in the colour of its weight; the brightest has the most. Padding is not drawn. */
export function drawNeighborhood(canvas, layer, head) {
  const context = canvas.getContext("2d");
  const [height, width] = layer.size;
  const [down, across] = [canvas.height / height, canvas.width / width];
  const weights = weightsOf(layer, head);
  const most = Math.max(...weights.flat());
  context.fillStyle = "rgb(0 0 0 / 45%)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  layer.rows.forEach((row, i) => layer.columns.forEach((column, j) => {
    if (row >= height || column >= width) return;
    const [red, green, blue] = heat(0.15 + 0.85 * weights[i][j] / most);
    context.fillStyle = `rgb(${red} ${green} ${blue} / 80%)`;
    context.fillRect(column * across, row * down, Math.max(1, across - 1), Math.max(1, down - 1));
  }));
  context.strokeStyle = "#fff";
  context.lineWidth = Math.max(1.5, canvas.width / 200);
  context.strokeRect(layer.query[1] * across, layer.query[0] * down, across, down);
}

/** In words, for who cannot see it. */
export function describe(layer) {
  const [height, width] = layer.size;
  const inside = layer.rows.filter((row) => row < height).length * layer.columns.filter((column) => column < width).length;
  return `stage ${layer.stage}, layer ${layer.layer}, dilation ${layer.dilation}: ${inside} keys of a map of ${height}×${width}`;
}
