/** Feature maps as pictures. A map is {shape: [channels, height, width], values: Float32Array}. */

const RAMP = [[13, 8, 60], [84, 20, 125], [170, 45, 110], [235, 105, 60], [250, 180, 50], [252, 252, 190]];

const MOST_POSITIONS = 4096; // principal components of larger maps are those of every so-many-th position

/** A colour, [red, green, blue], for 0 to 1. */
export function heat(value) {
  const at = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((colour, i) => colour + (at - low) * (RAMP[low + 1][i] - colour));
}

/** The mean of the magnitudes over the channels, at each position. (The plain mean says nothing: a layer norm made it zero.) */
export function magnitude({ shape: [channels, height, width], values }) {
  const positions = height * width;
  const sums = new Float64Array(positions);
  for (let c = 0; c < channels; c++) {
    for (let p = 0; p < positions; p++) sums[p] += Math.abs(values[c * positions + p]);
  }
  return sums.map((sum) => sum / channels);
}

/**
 * The first principal components of the positions, as vectors over the channels: `count` arrays of one number for each position.
 * By power iteration, each one orthogonal to those before it.
 */
export function principalComponents({ shape: [channels, height, width], values }, count = 3) {
  const positions = height * width;
  const centred = new Float32Array(values.length);
  for (let c = 0; c < channels; c++) {
    let sum = 0;
    for (let p = 0; p < positions; p++) sum += values[c * positions + p];
    for (let p = 0; p < positions; p++) centred[c * positions + p] = values[c * positions + p] - sum / positions;
  }
  const project = (direction, step) => {
    const projected = new Float64Array(positions);
    for (let c = 0; c < channels; c++) {
      for (let p = 0; p < positions; p += step) projected[p] += direction[c] * centred[c * positions + p];
    }
    return projected;
  };
  const step = Math.ceil(positions / MOST_POSITIONS);
  const directions = [];
  for (let k = 0; k < Math.min(count, channels); k++) {
    let direction = normalised(Float64Array.from({ length: channels }, (_, c) => Math.sin(1 + c * (k + 1))), directions);
    for (let turn = 0; turn < 200; turn++) {
      const projected = project(direction, step);
      const next = new Float64Array(channels);
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let p = 0; p < positions; p += step) sum += projected[p] * centred[c * positions + p];
        next[c] = sum;
      }
      const turned = normalised(next, directions);
      const likeness = turned.reduce((sum, value, c) => sum + value * direction[c], 0);
      direction = turned;
      if (likeness > 1 - 1e-9) break;
    }
    directions.push(direction);
  }
  return directions.map((direction) => project(direction, 1));
}

/** The vector with length 1, orthogonal to the others. */
function normalised(vector, others) {
  for (const other of others) {
    const along = vector.reduce((sum, value, c) => sum + value * other[c], 0);
    vector = vector.map((value, c) => value - along * other[c]);
  }
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

/** Draw numbers, one for each position, from their least to their largest. Returns both. */
export function drawHeat(canvas, numbers, height, width) {
  let [least, largest] = [Infinity, -Infinity];
  for (const number of numbers) [least, largest] = [Math.min(least, number), Math.max(largest, number)];
  paint(canvas, height, width, (p) => heat((numbers[p] - least) / (largest - least || 1)));
  return [least, largest];
}

/** Draw up to three components as red, green and blue, each within two standard deviations. */
export function drawComponents(canvas, components, height, width) {
  const spread = components.map((one) => 4 * Math.sqrt(one.reduce((sum, value) => sum + value * value, 0) / one.length) || 1);
  paint(canvas, height, width, (p) => [0, 1, 2].map((i) => 255 * (0.5 + (components[i]?.[p] ?? 0) / (spread[i] ?? 1))));
}

function paint(canvas, height, width, colour) {
  [canvas.height, canvas.width] = [height, width];
  const picture = new ImageData(width, height); // whose bytes are clamped
  for (let p = 0; p < height * width; p++) picture.data.set([...colour(p), 255], 4 * p);
  canvas.getContext("2d").putImageData(picture, 0, 0);
}
