/** Visualization of feature maps. */

import { context2d } from "./dom.js";

/** @typedef {import("./service.js").FeatureMap} FeatureMap */
/** @typedef {ArrayLike<number> & Iterable<number>} Values one value for each position */

const RAMP = [[13, 8, 60], [84, 20, 125], [170, 45, 110], [235, 105, 60], [250, 180, 50], [252, 252, 190]];

const MAX_POSITIONS = 4096; // the principal components of larger feature maps are computed from a subset of their positions

/**
 * Return the color [red, green, blue] for a value from 0 to 1.
 * @param {number} value
 */
export function heat(value) {
  const position = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(position), RAMP.length - 2);
  return RAMP[low].map((color, i) => color + (position - low) * (RAMP[low + 1][i] - color));
}

/**
 * Return the mean magnitude over the channels at each position. The mean itself is zero because of layer norm.
 * @param {FeatureMap} featureMap
 */
export function magnitude({ shape: [channels, height, width], values }) {
  const positions = height * width;
  const sums = new Float64Array(positions);
  for (let c = 0; c < channels; c++) {
    for (let p = 0; p < positions; p++) sums[p] += Math.abs(values[c * positions + p]);
  }
  return sums.map((sum) => sum / channels);
}

/**
 * Return the first `count` principal components of the channel vectors: for each one an array with one value per position.
 * Computed by power iteration; each direction is orthogonal to the previous ones.
 * @param {FeatureMap} featureMap
 */
export function principalComponents({ shape: [channels, height, width], values }, count = 3) {
  const positions = height * width;
  const centered = new Float32Array(values.length);
  for (let c = 0; c < channels; c++) {
    let sum = 0;
    for (let p = 0; p < positions; p++) sum += values[c * positions + p];
    for (let p = 0; p < positions; p++) centered[c * positions + p] = values[c * positions + p] - sum / positions;
  }
  /**
   * @param {Float64Array} direction
   * @param {number} step
   */
  const project = (direction, step) => {
    const projected = new Float64Array(positions);
    for (let c = 0; c < channels; c++) {
      for (let p = 0; p < positions; p += step) projected[p] += direction[c] * centered[c * positions + p];
    }
    return projected;
  };
  const step = Math.ceil(positions / MAX_POSITIONS);
  /** @type {Float64Array[]} */
  const directions = [];
  for (let k = 0; k < Math.min(count, channels); k++) {
    let direction = orthonormalized(Float64Array.from({ length: channels }, (_, c) => Math.sin(1 + c * (k + 1))), directions);
    for (let iteration = 0; iteration < 200; iteration++) {
      const projected = project(direction, step);
      const next = new Float64Array(channels);
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let p = 0; p < positions; p += step) sum += projected[p] * centered[c * positions + p];
        next[c] = sum;
      }
      const updated = orthonormalized(next, directions);
      const similarity = updated.reduce((sum, value, c) => sum + value * direction[c], 0);
      direction = updated;
      if (similarity > 1 - 1e-9) break;
    }
    directions.push(direction);
  }
  return directions.map((direction) => project(direction, 1));
}

/**
 * Make a vector orthogonal to others and scale it to length 1.
 * @param {Float64Array} vector
 * @param {Float64Array[]} others
 */
function orthonormalized(vector, others) {
  for (const other of others) {
    const projection = vector.reduce((sum, value, c) => sum + value * other[c], 0);
    vector = vector.map((value, c) => value - projection * other[c]);
  }
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

/**
 * Draw values scaled from their minimum to their maximum. Returns [minimum, maximum].
 * @param {HTMLCanvasElement} canvas
 * @param {Values} values
 * @param {number} height
 * @param {number} width
 */
export function drawHeat(canvas, values, height, width) {
  let [minimum, maximum] = [Infinity, -Infinity];
  for (const value of values) [minimum, maximum] = [Math.min(minimum, value), Math.max(maximum, value)];
  paint(canvas, height, width, (p) => heat((values[p] - minimum) / (maximum - minimum || 1)));
  return [minimum, maximum];
}

/**
 * Draw up to three components as red, green and blue, each clipped to two standard deviations.
 * @param {HTMLCanvasElement} canvas
 * @param {Float64Array[]} components
 * @param {number} height
 * @param {number} width
 */
export function drawComponents(canvas, components, height, width) {
  const ranges = components.map((values) => 4 * Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length));
  paint(canvas, height, width, (p) => [0, 1, 2].map((i) => 255 * (0.5 + (components[i]?.[p] ?? 0) / (ranges[i] || 1))));
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {number} height
 * @param {number} width
 * @param {(position: number) => number[]} colorAt
 */
function paint(canvas, height, width, colorAt) {
  [canvas.height, canvas.width] = [height, width];
  const pixels = new ImageData(width, height); // clamps its values to 0 to 255
  for (let p = 0; p < height * width; p++) pixels.data.set([...colorAt(p), 255], 4 * p);
  context2d(canvas).putImageData(pixels, 0, 0);
}
