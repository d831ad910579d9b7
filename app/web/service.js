/** Requests to the service's endpoints. Paths are relative, so that the page works behind a proxy under a path prefix. */

/** An error response, with its HTTP status. */
export class ServiceError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

let key = sessionStorage.getItem("dinat-key") ?? "";

/** Set the API key of all further requests. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem("dinat-key", value);
}

/** Return whether requests have an API key. */
export const hasKey = () => key !== "";

/** Return the readiness of the service, {status, detail}. */
export async function health() {
  return (await send("health", {}, true)).json();
}

/** Return the description of the active model: labels, configuration, image processor settings. */
export async function model() {
  return (await send("model")).json();
}

/**
 * Classify an image. Returns {predictions: [{label, class_id, score}], times, milliseconds}: the times of the stages in the
 * service, and of the round trip.
 */
export async function classify(image, topK) {
  const started = performance.now();
  const response = await send(`classify?top_k=${topK}`, { image });
  const { predictions } = await response.json();
  return { predictions, times: times(response), milliseconds: performance.now() - started };
}

/** Return feature maps by name: {shape: [channels, height, width], values: Float32Array}. */
export async function features(image, names) {
  const accept = "application/vnd.safetensors";
  const response = await send(`features?features=${names.join(",")}`, { image, accept });
  return parseSafetensors(await response.arrayBuffer());
}

/** Return the neighborhood of a point in each layer: {stage, layer, dilation, size, query, rows, columns, weights}. */
export async function attention(image, point) {
  const response = await send(attentionPath(point), { image });
  return (await response.json()).layers;
}

export const attentionPath = ({ y, x }) => `attention?y=${y.toFixed(4)}&x=${x.toFixed(4)}`;

async function send(path, { image, accept } = {}, anyStatus = false) {
  const headers = {};
  if (key) headers["X-API-Key"] = key;
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

/** Parse Server-Timing into {stage: milliseconds}. */
function times(response) {
  const stages = (response.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...stages].map(([, stage, milliseconds]) => [stage, Number(milliseconds)]));
}

/** Parse a safetensors file (https://huggingface.co/docs/safetensors): length of the header, header, values. */
function parseSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = {};
  for (const [name, { shape, data_offsets: [start, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    tensors[name] = { shape, values: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return tensors;
}
