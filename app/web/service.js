/**
 * Requests to the service's endpoints. Paths are relative, so that the page works behind a proxy under a path prefix.
 *
 * @typedef {{label: string, class_id: number, score: number}} Prediction
 * @typedef {{shape: number[], values: Float32Array}} FeatureMap shape: channels, height, width
 * @typedef {{y: number, x: number}} Point position in the image, from 0 to 1
 * @typedef {Record<string, number>} Times milliseconds of each stage of a request, and `total`
 *
 * The neighborhood of a point in a layer: size and query are [height, width] and [row, column] of the feature map, rows and
 * columns those of the keys, weights [head][row][column].
 * @typedef {{stage: number, layer: number, dilation: number, size: number[], query: number[], rows: number[], columns: number[],
 *   weights: number[][][]}} Layer
 *
 * @typedef {{height: number, width: number}} Size
 * @typedef {{do_resize?: boolean, size: any, do_center_crop?: boolean, crop_size?: any, crop_pct?: number}} ImageProcessor
 * @typedef {{depths: number[], kernel_size: number, dilations: number[][]}} Config
 * @typedef {{name: string, reason: string}} Disabled
 * @typedef {{model: string, labels: string[], config: Config, input_size: ImageProcessor, runtime: string, device: string,
 *   precision: string, attention: Record<string, string>, disabled: Disabled[], features: string[]}} Model response of GET /model
 */

/** An error response, with its HTTP status. */
export class ServiceError extends Error {
  /**
   * @param {number} status
   * @param {string} detail
   */
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

const KEY = "dinat-key"; // of the API key in the storage of the tab

/**
 * Set the API key of all further requests.
 * @param {string} value
 */
export const setKey = (value) => sessionStorage.setItem(KEY, value);

/** Return the API key, or an empty string. */
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

/**
 * Return the readiness of the service.
 * @returns {Promise<{status: string, detail: string}>}
 */
export async function health() {
  return (await send("health", {}, true)).json();
}

/**
 * Return the description of the active model: labels, configuration, image processor settings.
 * @returns {Promise<Model>}
 */
export async function model() {
  return (await send("model")).json();
}

/**
 * Classify an image. The times are those of the stages in the service, milliseconds that of the round trip.
 * @param {Blob} image
 * @param {number} topK
 * @returns {Promise<{predictions: Prediction[], times: Times, milliseconds: number}>}
 */
export async function classify(image, topK) {
  const started = performance.now();
  const response = await send(`classify?top_k=${topK}`, { image });
  const { predictions } = await response.json();
  return { predictions, times: times(response), milliseconds: performance.now() - started };
}

/**
 * Return feature maps by name.
 * @param {Blob} image
 * @param {string[]} names
 * @returns {Promise<Record<string, FeatureMap>>}
 */
export async function features(image, names) {
  const accept = "application/vnd.safetensors";
  const response = await send(`features?features=${names.join(",")}`, { image, accept });
  return parseSafetensors(await response.arrayBuffer());
}

/**
 * Return the neighborhood of a point in each layer.
 * @param {Blob} image
 * @param {Point} point
 * @returns {Promise<Layer[]>}
 */
export async function attention(image, point) {
  const response = await send(attentionPath(point), { image });
  return (await response.json()).layers;
}

/** @param {Point} point */
export const attentionPath = ({ y, x }) => `attention?y=${y.toFixed(4)}&x=${x.toFixed(4)}`;

/**
 * @param {string} path
 * @param {{image?: Blob, accept?: string}} request
 * @param {boolean} anyStatus return error responses too
 * @returns {Promise<Response>}
 */
async function send(path, { image, accept } = {}, anyStatus = false) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (apiKey()) headers["X-API-Key"] = apiKey();
  if (accept) headers.Accept = accept;
  const body = image?.slice(0, image.size, "application/octet-stream"); // the service detects the format from the bytes
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body });
  } catch {
    throw new Error("The service does not respond: check that it is running and that the image file still exists.");
  }
  if (response.ok || anyStatus) return response;
  const problem = await response.json().catch(() => ({}));
  throw new ServiceError(response.status, problem.detail ?? `the service returned ${response.status} ${response.statusText}`);
}

/**
 * Parse Server-Timing.
 * @param {Response} response
 * @returns {Times}
 */
function times(response) {
  const stages = (response.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...stages].map(([, stage, milliseconds]) => [stage, Number(milliseconds)]));
}

/**
 * Parse a safetensors file (https://huggingface.co/docs/safetensors): length of the header, header, values.
 * @param {ArrayBuffer} buffer
 * @returns {Record<string, FeatureMap>}
 */
function parseSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  /** @type {Record<string, FeatureMap>} */
  const tensors = {};
  for (const [name, { shape, data_offsets: [start, end] }] of Object.entries(header)) {
    tensors[name] = { shape, values: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return tensors;
}
